"""Experts spread over expert-parallel ranks: every token's rows travel to the ranks of its experts and back.

T tokens of this rank, D model width, S slots per token, R = T S rows, E experts of all ranks, F experts here, G rows
that arrived here, N ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.kernels.experts import grouped_experts
from lockstep.kernels.slots import Slots, collect, spread
from lockstep.parallel.collectives import all_to_all_rows


class AllToAllExperts:
    """`ComputeExperts` over a group whose rank n holds the n-th part of the experts. Ranks may have no rows."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(
        self, x_TD: Tensor, experts_TS: Tensor, weights_TS: Tensor, gate_up_EJD: Tensor, down_EDI: Tensor
    ) -> Tensor:
        """The weights of this rank's experts, `[F, 2 I, D]` and `[F, D, I]`, stand where one process passes all."""
        num_ranks, num_here = self.group.size(), len(gate_up_EJD)
        slots = Slots.of(experts_TS, num_ranks * num_here)
        counts_NF = slots.ends_E.diff(prepend=slots.ends_E.new_zeros(1)).view(num_ranks, num_here)
        arriving_NF = torch.empty_like(counts_NF)
        dist.all_to_all_single(arriving_NF, counts_NF, group=self.group)
        sent, received = torch.stack([counts_NF.sum(1), arriving_NF.sum(1)]).tolist()

        rows_GD = all_to_all_rows(spread(x_TD, slots), sent, received, self.group)
        weights_G1 = all_to_all_rows(weights_TS.flatten()[slots.slot_R].unsqueeze(1), sent, received, self.group)
        expert_G = torch.arange(num_here, device=x_TD.device).repeat(num_ranks)
        expert_G = expert_G.repeat_interleave(arriving_NF.flatten(), output_size=len(rows_GD))
        out_GD = grouped_experts(rows_GD, expert_G.unsqueeze(1), weights_G1, gate_up_EJD, down_EDI)
        return collect(all_to_all_rows(out_GD, received, sent, self.group), slots)
