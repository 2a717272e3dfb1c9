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


def norm_and_rotate_both(
    q_TNH: Tensor,
    k_TKH: Tensor,
    q_weight_H: Tensor,
    k_weight_H: Tensor,
    eps: float,
    weight_offset: float,
    tables: tuple[Tensor, Tensor],
) -> Tensor:
    """`norm_and_rotate` of queries and of keys, side by side `[T, N + K, H]`, in half the operations.

    For fp32 without gradients; agrees with the separate operations to rounding.
    """
    num_heads, head_dim = q_TNH.shape[1:]
    both = torch.cat((q_TNH, k_TKH), dim=1)
    norms = torch.linalg.vector_norm(both, dim=-1, keepdim=True)
    both.mul_(norms.square_().div_(head_dim).add_(eps).rsqrt_())
    if weight_offset:
        q_weight_H, k_weight_H = weight_offset + q_weight_H, weight_offset + k_weight_H
    both[:, :num_heads].mul_(q_weight_H)
    both[:, num_heads:].mul_(k_weight_H)
    return rotate(both, tables)
