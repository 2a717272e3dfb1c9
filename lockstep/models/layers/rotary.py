"""Rotary position embedding in the half-split layout of HF's Llama and Qwen models.

T packed tokens, N heads, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(positions_T: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of every position, `[T, 1, H]` each, computed in fp32 as HF does.

    Source: RoFormer, arXiv:2104.09864, with the two halves of a head rotated against each other; the first half of
    the sine carries the minus of that rotation.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_T.device) / head_dim
    # HF's own order of operations: far from the start, a frequency rounded otherwise is another angle.
    frequencies = 1.0 / theta**exponents
    angles = positions_T.float()[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1)[:, None].to(dtype), torch.cat((-sin, sin), dim=-1)[:, None].to(dtype)


def rotate(x_TNH: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each head vector by its token's position."""
    cos, signed_sin = tables
    return torch.addcmul(x_TNH * cos, x_TNH.roll(x_TNH.shape[-1] // 2, dims=-1), signed_sin)
