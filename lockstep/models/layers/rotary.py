"""Rotary position embedding in the half-split layout of HF's Llama and Qwen models.

T packed tokens, N heads, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(positions_T: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position, `[T, 1, H]` each, computed in fp32 as HF does.

    Source: RoFormer, arXiv:2104.09864, with the two halves of a head rotated against each other.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_T.device) / head_dim
    # HF's own order of operations: far from the start, a frequency rounded otherwise is another angle.
    frequencies = 1.0 / theta**exponents
    angles = positions_T.float()[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_TNH: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each head vector by its token's position."""
    cos, sin = tables
    first, second = x_TNH.chunk(2, dim=-1)
    return x_TNH * cos + torch.cat((-second, first), dim=-1) * sin
