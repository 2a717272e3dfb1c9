"""Root-mean-square normalisation of rows (arXiv:1910.07467), alone and where a residual stream passes by.

R rows, D width, the last dimension.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from lockstep.kernels.fused import apply, is_fused


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float, weight_offset: float) -> Tensor:
    """Rows over their root mean square, times `weight_offset + weight`.

    An offset is added in fp32, and everything is done in fp32 then: a bf16 weight near 0 keeps digits that 1 + weight
    would lose.
    """
    if weight_offset == 0.0:
        return F.rms_norm(x, weight_D.shape, weight_D, eps)
    return F.rms_norm(x.float(), weight_D.shape, weight_offset + weight_D.float(), eps).to(x.dtype)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    """As the reference."""
    if is_fused(x, weight_D):
        from lockstep.kernels.rms_norm_triton import RMSNorm

        normed: Tensor = apply(RMSNorm, x, None, weight_D, eps, weight_offset)[1]
        return normed
    return rms_norm_reference(x, weight_D, eps, weight_offset)


def residual_rms_norm(
    x: Tensor, update: Tensor | None, weight_D: Tensor, eps: float, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The stream `x + update` (`x` itself without one) and its norm, with one pass forward and one backward."""
    if is_fused(x, weight_D):
        from lockstep.kernels.rms_norm_triton import RMSNorm

        stream, normed = apply(RMSNorm, x, update, weight_D, eps, weight_offset)
        return stream, normed
    stream = x if update is None else x + update
    return stream, rms_norm_reference(stream, weight_D, eps, weight_offset)
