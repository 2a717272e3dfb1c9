"""Mixture-of-experts feed-forward over rows sorted by expert.

T tokens, D model width, E experts, I expert width, S slots per token, R = T * S routed rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lockstep.kernels.slots import Slots, collect, spread
from lockstep.kernels.swiglu import weighted_swiglu


def experts_reference(
    x_TD: Tensor, experts_TS: Tensor, weights_TS: Tensor, gate_up_EJD: Tensor, down_EDI: Tensor
) -> Tensor:
    """The specification: every expert in turn, on the tokens that chose it."""
    mixed = torch.zeros_like(x_TD)
    for expert in range(gate_up_EJD.shape[0]):
        tokens, slots = (experts_TS == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x_TD[tokens], gate_up_EJD[expert]).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, down_EDI[expert])
        mixed = mixed.index_add(0, tokens, out * weights_TS[tokens, slots, None])
    return mixed


def grouped_experts(
    x_TD: Tensor, experts_TS: Tensor, weights_TS: Tensor, gate_up_EJD: Tensor, down_EDI: Tensor
) -> Tensor:
    """The same sum through two grouped matrix products.

    A slot's weight scales what enters the second product, so the backward pass needs nothing that comes out of it.
    Slots are summed in the router's order, not scattered with atomics, so the result repeats bit for bit. `grouped_mm`
    wants rows of a multiple of 16 bytes; for other widths, which only toy models have, the specification runs.
    """
    if any(weight.shape[-1] * weight.element_size() % 16 for weight in (gate_up_EJD, down_EDI)):
        return experts_reference(x_TD, experts_TS, weights_TS, gate_up_EJD, down_EDI)
    slots = Slots.of(experts_TS, len(gate_up_EJD))
    gate_up_RJ = F.grouped_mm(spread(x_TD, slots), gate_up_EJD.transpose(1, 2), offs=slots.ends_E)
    out_RD = F.grouped_mm(weighted_swiglu(gate_up_RJ, weights_TS, slots), down_EDI.transpose(1, 2), offs=slots.ends_E)
    return collect(out_RD, slots)


def local_experts(
    x_TD: Tensor,
    experts_TS: Tensor,
    weights_TS: Tensor,
    gate_up_EJD: Tensor,
    down_EDI: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """What these experts add to every row, `[T, D]`, where others may be elsewhere; no gradients.

    A slot whose expert is not one of 0 ... E - 1 counts nothing. No shape depends on how many there are.

    Args:
        dtype: of the sums over slots; fp32 for those of ranks, which are summed before they are rounded.
    """
    num_experts = len(gate_up_EJD)
    if num_experts == 0:
        return torch.zeros_like(x_TD, dtype=dtype)
    is_elsewhere_TS = (experts_TS < 0) | (experts_TS >= num_experts)
    slots = Slots.of(experts_TS.masked_fill(is_elsewhere_TS, num_experts), num_experts)
    gate_up_RJ = F.grouped_mm(spread(x_TD, slots), gate_up_EJD.transpose(1, 2), offs=slots.ends_E)
    out_RD = F.grouped_mm(weighted_swiglu(gate_up_RJ, weights_TS, slots), down_EDI.transpose(1, 2), offs=slots.ends_E)
    out_TSD = torch.empty_like(out_RD).index_copy(0, slots.slot_R, out_RD).view(*experts_TS.shape, -1)
    # Rows past the last group were not computed: whatever stands there must not count.
    return out_TSD.masked_fill_(is_elsewhere_TS[..., None], 0.0).sum(1, dtype=dtype)
