"""Experts of all ranks serving the rows of all ranks, with shapes that every rank knows beforehand.

Where the rows of an all-to-all are as many as routers say, which the host has to read, here all rows go to all ranks:
all-gather, this rank's experts, reduce-scatter. For the few rows of a decoding step that costs less than waiting.

T rows of this rank, N rows that all ranks agreed to exchange each, G = ranks x N, D model width, S slots per token, E
experts here, I expert width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lockstep.kernels.experts import local_experts
from lockstep.models import LanguageModel
from lockstep.models.layers.moe import Experts
from lockstep.parallel.collectives import all_gather_rows, reduce_scatter_rows

_MOST_ROWS = 2048
"""Rows that a rank sends at once: a prefill of many rows goes in pieces, so that memory stays bounded."""


class VisitExperts:
    """`ComputeExperts` of ranks that call it at the same time, each with some rows or with none.

    Args:
        first_expert: the first of those that this rank owns.
    """

    def __init__(self, group: dist.ProcessGroup | None, first_expert: int) -> None:
        assert group is not None, "there is no group before ranks have met"
        self.group = group
        self.first_expert = first_expert
        self.num_rows = 0
        """N of the present pass; `Peers` sets it."""

    def __call__(
        self, x_TD: Tensor, experts_TS: Tensor, weights_TS: Tensor, gate_up_EJD: Tensor, down_EDI: Tensor
    ) -> Tensor:
        missing = self.num_rows - len(x_TD)
        assert missing >= 0, "a pass has no more rows than were agreed on"
        x_ND = F.pad(x_TD, (0, 0, 0, missing))
        experts_NS = F.pad(experts_TS, (0, 0, 0, missing), value=-1)  # nobody's
        weights_NS = F.pad(weights_TS, (0, 0, 0, missing))
        pieces = zip(x_ND.split(_MOST_ROWS), experts_NS.split(_MOST_ROWS), weights_NS.split(_MOST_ROWS), strict=True)
        mixed = [self._visit(*piece, gate_up_EJD, down_EDI) for piece in pieces]
        return torch.cat(mixed)[: len(x_TD)]

    def _visit(
        self, x_ND: Tensor, experts_NS: Tensor, weights_NS: Tensor, gate_up_EJD: Tensor, down_EDI: Tensor
    ) -> Tensor:
        x_GD, experts_GS, weights_GS = (all_gather_rows(x, self.group) for x in (x_ND, experts_NS, weights_NS))
        here_GS = experts_GS - self.first_expert
        sums_GD = local_experts(x_GD, here_GS, weights_GS, gate_up_EJD, down_EDI, torch.float32)
        return reduce_scatter_rows(sums_GD, self.group).to(x_ND.dtype)


class Peers:
    """The ranks that sample together, as one of them sees them: what they agree on before and after every pass."""

    def __init__(self, model: LanguageModel, device: torch.device) -> None:
        self._experts = [module for module in model.modules() if isinstance(module, Experts)]
        self._width, self._slots = model.config.hidden_size, model.config.num_experts_per_tok
        self._device = device

    def most(self, count: int) -> int:
        """The largest of all ranks' counts, on each of them."""
        counts = torch.tensor([count], device=self._device)
        dist.all_reduce(counts, dist.ReduceOp.MAX)
        return int(counts)

    def agree_on_rows(self, num_rows: int) -> None:
        """Settle how many rows every rank exchanges in the pass that comes."""
        agreed = self.most(num_rows)
        for experts in self._experts:
            assert isinstance(experts.compute, VisitExperts), "these experts serve one rank only"
            experts.compute.num_rows = agreed

    def serve(self) -> None:
        """Take part in a pass without rows of one's own."""
        for experts in self._experts:
            weight = experts.gate_up_proj
            x_TD = weight.new_zeros((0, self._width))
            experts_TS = torch.zeros((0, self._slots), dtype=torch.int64, device=self._device)
            experts(x_TD, experts_TS, weight.new_zeros((0, self._slots)))
