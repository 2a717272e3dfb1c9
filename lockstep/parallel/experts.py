"""Experts spread over expert-parallel ranks: every token's rows travel to the ranks of its experts and back.

With expert tensor parallelism several ranks share an expert's width, and a row travels to all of them; their answers
are shares of a sum. Such ranks store whole experts between them, as FSDP stores everything, and gather them for the
time of a layer: what they divide is the work.

T tokens of this rank, D model width, S slots per token, R = T S rows, E experts of all ranks, F experts here, G rows
that arrived here, N expert-parallel ranks, each K expert-tensor-parallel ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.kernels.experts import grouped_experts
from lockstep.kernels.slots import Slots, collect, spread
from lockstep.models.layers.moe import Experts
from lockstep.parallel.collectives import all_to_all_rows
from lockstep.parallel.local import Views


class AllToAllExperts:
    """`ComputeExperts` over a group of N x K ranks. Ranks may have no rows.

    Args:
        num_shares: K, the ranks that share an expert, which are next to each other in the group.
    """

    def __init__(self, group: dist.ProcessGroup, num_shares: int) -> None:
        self.group, self.num_shares = group, num_shares

    def __call__(
        self, x_TD: Tensor, experts_TS: Tensor, weights_TS: Tensor, gate_up_EJD: Tensor, down_EDI: Tensor
    ) -> Tensor:
        """Takes the weights of this rank's experts, `[F, 2 I / K, D]` and `[F, D, I / K]`."""
        num_parts, num_here = self.group.size() // self.num_shares, len(gate_up_EJD)
        slots = Slots.of(experts_TS, num_parts * num_here)
        counts_NF = slots.ends_E.diff(prepend=slots.ends_E.new_zeros(1)).view(num_parts, num_here)
        leaving_PF = counts_NF.repeat_interleave(self.num_shares, 0)
        arriving_PF = torch.empty_like(leaving_PF)
        dist.all_to_all_single(arriving_PF, leaving_PF, group=self.group)
        sent, received = torch.stack([leaving_PF.sum(1), arriving_PF.sum(1)]).tolist()

        weights_R1 = weights_TS.flatten()[slots.slot_R].unsqueeze(1)
        rows_GD, weights_G1 = (
            all_to_all_rows(self._for_all_shares(rows, sent), sent, received, self.group)
            for rows in (spread(x_TD, slots), weights_R1)
        )
        expert_G = torch.arange(num_here, device=x_TD.device).repeat(len(received))
        expert_G = expert_G.repeat_interleave(arriving_PF.flatten(), output_size=len(rows_GD))
        out_GD = grouped_experts(rows_GD, expert_G.unsqueeze(1), weights_G1, gate_up_EJD, down_EDI)
        answers = all_to_all_rows(out_GD, received, sent, self.group)
        return collect(self._sum_of_shares(answers, sent), slots)

    def _for_all_shares(self, rows_RD: Tensor, sent: list[int]) -> Tensor:
        """Rows for every rank, from rows for every set of experts."""
        if self.num_shares == 1:
            return rows_RD
        parts = rows_RD.split(sent[:: self.num_shares])
        return torch.cat([part for part in parts for _ in range(self.num_shares)])

    def _sum_of_shares(self, rows: Tensor, sent: list[int]) -> Tensor:
        """The way back from `_for_all_shares`."""
        if self.num_shares == 1:
            return rows
        parts = rows.split(sent)
        starts = range(0, len(parts), self.num_shares)
        return torch.cat([torch.stack(parts[start : start + self.num_shares]).sum(0) for start in starts])


def divide_width(experts: Experts, share: int, num_shares: int, views: Views) -> None:
    """Let a rank compute with its share of every expert's width: gates and their ups, and what leads down from them."""

    def gates_and_ups(gate_up_EJD: Tensor) -> Tensor:
        return torch.cat([half.chunk(num_shares, 1)[share] for half in gate_up_EJD.chunk(2, 1)], 1)

    def downs(down_EDI: Tensor) -> Tensor:
        return down_EDI.chunk(num_shares, 2)[share].contiguous()

    views[experts, "gate_up_proj"], views[experts, "down_proj"] = gates_and_ups, downs
