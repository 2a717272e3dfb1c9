"""The gated activation of SwiGLU (arXiv:2002.05202), plain and with a weight per row.

R rows, I width, J = 2 I, T tokens, S slots per token.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from lockstep.kernels.fused import apply, is_fused
from lockstep.kernels.slots import Slots


def swiglu(gate_RI: Tensor, up_RI: Tensor) -> Tensor:
    """`silu(gate) * up`. The fused version rounds once, the plain one twice."""
    if is_fused(gate_RI, up_RI):
        from lockstep.kernels.swiglu_triton import SwiGLU

        fused: Tensor = apply(SwiGLU, gate_RI, up_RI)
        return fused
    return F.silu(gate_RI) * up_RI


def weighted_swiglu(gate_up_RJ: Tensor, weights_TS: Tensor, slots: Slots) -> Tensor:
    """`silu(gate) * up * weight` of every slot's row, `[R, I]`: gates are the left half of `gate_up_RJ`."""
    if is_fused(gate_up_RJ, weights_TS):
        from lockstep.kernels.swiglu_triton import WeightedSwiGLU

        fused: Tensor = apply(WeightedSwiGLU, gate_up_RJ, weights_TS, slots.row_TS)
        return fused
    gate_RI, up_RI = gate_up_RJ.chunk(2, dim=-1)
    return F.silu(gate_RI) * up_RI * weights_TS.flatten()[slots.slot_R].unsqueeze(1)
