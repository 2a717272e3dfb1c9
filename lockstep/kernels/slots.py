"""Rows on their way to experts and back: sorted by expert, and summed again for each token.

T tokens, D width, S slots per token, R = T S rows, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lockstep.kernels.fused import apply, is_fused
from lockstep.kernels.lookup import look_up


@dataclass(frozen=True)
class Slots:
    """Where the row of every slot lies when rows are sorted by expert, those of one expert in the order of tokens."""

    row_TS: Tensor
    slot_R: Tensor
    """The other way round: which slot, counted through all tokens, row r belongs to."""
    ends_E: Tensor
    """One past the last row of each expert, int32."""

    @classmethod
    def of(cls, experts_TS: Tensor, num_experts: int) -> Slots:
        # Sorting takes time by the bits of its keys.
        key = torch.int16 if num_experts < 2**15 else torch.int32
        sorted_R, slot_R = experts_TS.flatten().to(key).sort(stable=True)
        ids_E = torch.arange(num_experts, dtype=key, device=experts_TS.device)
        row_R = torch.empty_like(slot_R).scatter_(0, slot_R, torch.arange(len(slot_R), device=experts_TS.device))
        ends_E = torch.searchsorted(sorted_R, ids_E, right=True, out_int32=True)
        return cls(row_R.view(experts_TS.shape), slot_R, ends_E)


def spread(x_TD: Tensor, slots: Slots) -> Tensor:
    """Each token's row once for every slot, `[R, D]`. The gradient sums over slots in the router's order; on a CPU in
    that of the experts."""
    if is_fused(x_TD):
        from lockstep.kernels.slots_triton import Spread

        fused: Tensor = apply(Spread, x_TD, slots.row_TS)
        return fused
    return look_up(x_TD, slots.slot_R // slots.row_TS.shape[1])


def collect(rows_RD: Tensor, slots: Slots) -> Tensor:
    """The sum of each token's slots, `[T, D]`, in fp32 and in the router's order, rounded once.

    Its backward needs no row: a layer that is computed again stops before the product that made them.
    """
    if is_fused(rows_RD):
        from lockstep.kernels.slots_triton import Collect

        fused: Tensor = apply(Collect, rows_RD, slots.row_TS)
        return fused
    unsorted_RD = torch.empty_like(rows_RD).index_copy(0, slots.slot_R, rows_RD)
    return unsorted_RD.view(*slots.row_TS.shape, rows_RD.shape[1]).sum(1)
