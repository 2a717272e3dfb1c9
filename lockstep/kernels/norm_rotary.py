"""Norm of every head and its rotation by the token's position, as queries and keys need them.

T packed tokens, N heads, H head dim, R <= H leading dims of a head that are turned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.kernels.fused import apply, is_fused
from lockstep.kernels.rms_norm import rms_norm_reference


def rotate(x_TNH: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the leading R dims of each head vector by its token's position: cosine and signed sine are `[T, 1, R]`."""
    cos, signed_sin = tables
    turned_dims = cos.shape[-1]
    x_TNR = x_TNH[..., :turned_dims]
    turned_TNR = torch.addcmul(x_TNR * cos, x_TNR.roll(turned_dims // 2, dims=-1), signed_sin)
    if turned_dims == x_TNH.shape[-1]:
        return turned_TNR
    return torch.cat((turned_TNR, x_TNH[..., turned_dims:]), dim=-1)


def norm_and_rotate(
    x_TNH: Tensor, weight_H: Tensor, eps: float, weight_offset: float, tables: tuple[Tensor, Tensor]
) -> Tensor:
    """`rotate(rms_norm(x))` over the head dim. The fused version rounds once; heads may lie apart in memory."""
    if is_fused(x_TNH, weight_H, *tables):
        from lockstep.kernels.norm_rotary_triton import NormRotary

        fused: Tensor = apply(NormRotary, x_TNH, weight_H, eps, weight_offset, *tables)
        return fused
    return rotate(rms_norm_reference(x_TNH, weight_H, eps, weight_offset), tables)
