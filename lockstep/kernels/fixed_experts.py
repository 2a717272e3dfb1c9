"""Mixture-of-experts feed-forward in which a token's bits do not depend on the tokens beside it.

T tokens, D model width, E experts, I expert width, J = 2 I, S slots per token, R = T * S routed rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.kernels.fixed_product import fixed_grouped_product
from lockstep.kernels.fixed_swiglu import fixed_swiglu
from lockstep.kernels.fused import is_fused
from lockstep.kernels.slots import Slots, collect, spread
from lockstep.kernels.swiglu import weighted_swiglu


def fixed_experts(
    x_TD: Tensor, experts_TS: Tensor, weights_TS: Tensor, gate_up_EJD: Tensor, down_EDI: Tensor
) -> Tensor:
    """As `grouped_experts`: each row through its expert, slots summed in the router's order."""
    slots = Slots.of(experts_TS, len(gate_up_EJD))
    gate_up_RJ = fixed_grouped_product(spread(x_TD, slots), gate_up_EJD, slots.ends_E)
    if is_fused(gate_up_RJ, weights_TS):
        inner_RI = weighted_swiglu(gate_up_RJ, weights_TS, slots)
        return collect(fixed_grouped_product(inner_RI, down_EDI, slots.ends_E), slots)
    inner_RI = fixed_swiglu(*gate_up_RJ.chunk(2, dim=-1)) * weights_TS.flatten()[slots.slot_R].unsqueeze(1)
    out_RD = fixed_grouped_product(inner_RI, down_EDI, slots.ends_E)
    return sum_in_order(out_RD[slots.row_TS])


def sum_in_order(x_TSD: Tensor) -> Tensor:
    """The sum over the second dimension in fp32 (or fp64), one after the other, rounded once."""
    first, *others = x_TSD.to(torch.promote_types(x_TSD.dtype, torch.float32)).unbind(1)
    for other in others:
        first = first + other
    return first.to(x_TSD.dtype)
