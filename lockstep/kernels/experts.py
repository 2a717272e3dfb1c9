"""Mixture-of-experts feed-forward over rows sorted by expert.

T tokens, D model width, E experts, I expert width, S slots per token, R = T * S routed rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


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

    Slots are summed in the router's order after un-sorting, not scattered with atomics, so the result repeats bit for
    bit. Needs rows of a multiple of 16 bytes (`grouped_mm`).
    """
    num_experts, slots = gate_up_EJD.shape[0], experts_TS.shape[1]
    flat_R = experts_TS.flatten()
    order_R = flat_R.argsort(stable=True)
    ends_E = torch.bincount(flat_R, minlength=num_experts).cumsum(0, dtype=torch.int32)
    rows_RD = x_TD[order_R // slots]
    gate, up = F.grouped_mm(rows_RD, gate_up_EJD.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    out_RD = F.grouped_mm(F.silu(gate) * up, down_EDI.transpose(1, 2), offs=ends_E)
    unsorted_TSD = torch.empty_like(out_RD).index_copy(0, order_R, out_RD).unflatten(0, (-1, slots))
    return torch.bmm(weights_TS[:, None], unsorted_TSD).squeeze(1)
