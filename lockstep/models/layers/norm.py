"""Root-mean-square normalisation (arXiv:1910.07467), plain, zero-centred and gated."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lockstep.kernels.rms_norm import residual_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """Scale rows to unit root mean square, then by a learnt weight."""

    weight_offset: ClassVar[float] = 0.0

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - self.weight_offset))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.weight_offset)

    def with_residual(self, x: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
        """The stream `x + update` (`x` itself without one) and its norm."""
        return residual_rms_norm(x, update, self.weight, self.eps, self.weight_offset)


class ZeroCentredRMSNorm(RMSNorm):
    """The same with 1 + weight."""

    weight_offset = 1.0


class GatedRMSNorm(nn.Module):
    """Normalise, scale, then multiply by silu(gate), the gate in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        normed = F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return (normed * F.silu(gate.float())).to(x.dtype)
