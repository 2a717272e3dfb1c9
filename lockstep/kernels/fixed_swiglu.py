"""The gated activation of SwiGLU, where a number's bits do not depend on its place in memory.

On a CPU torch computes `silu` of the last few numbers of a tensor by other instructions than of those before them, and
the two round differently. Exponentials, sums and quotients are the same everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.kernels.fused import is_fused
from lockstep.kernels.swiglu import swiglu


def fixed_swiglu(gate_RI: Tensor, up_RI: Tensor) -> Tensor:
    """`silu(gate) * up`."""
    if is_fused(gate_RI, up_RI):
        return swiglu(gate_RI, up_RI)
    wide = gate_RI.to(torch.promote_types(gate_RI.dtype, torch.float32))
    return (wide / (1 + torch.exp(-wide))).to(gate_RI.dtype) * up_RI
