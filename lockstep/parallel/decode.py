"""Experts of all ranks serving the rows of all ranks, with shapes that every rank knows beforehand.

Where the rows of an all-to-all are as many as routers say, which the host has to read, here all rows go to all ranks:
all-gather, this rank's experts, reduce-scatter. For the few rows of a decoding step that costs less than waiting.

T rows of this rank, N rows that all ranks agreed to exchange each, G = ranks x N, D model width, S slots per token, E
experts here, I expert width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lockstep.kernels.decode_experts import MOST_TOKENS, decode_experts
from lockstep.kernels.experts import local_experts
from lockstep.models import LanguageModel
from lockstep.models.layers.moe import Experts
from lockstep.parallel.collectives import all_gather_together, reduce_scatter_rows

_MOST_ROWS = 2048
"""Rows that a rank sends at once: a prefill of many rows goes in pieces, so that memory stays bounded."""


class VisitExperts:
    """`ComputeExperts` of ranks that call it at the same time, each with some rows or with none.

    With equal shapes on every rank nothing depends on the host: a CUDA graph may hold it.

    Args:
        first_expert: the first of those that this rank owns.
    """

    def __init__(self, group: dist.ProcessGroup | None, first_expert: int) -> None:
        assert group is not None, "there is no group before ranks have met"
        self.group = group
        self.first_expert = first_expert
        self.num_rows: int | None = None
        """N of the present pass, which `Peers` sets; None where every rank has as many."""

    def __call__(
        self, x_TD: Tensor, experts_TS: Tensor, weights_TS: Tensor, gate_up_EJD: Tensor, down_EDI: Tensor
    ) -> Tensor:
        num_rows, num_here = self.num_rows, len(x_TD)
        if num_rows is not None and num_rows != num_here:
            missing = num_rows - num_here
            assert missing > 0, "a pass has no more rows than were agreed on"
            x_TD = F.pad(x_TD, (0, 0, 0, missing))
            experts_TS = F.pad(experts_TS, (0, 0, 0, missing), value=-1)  # nobody's
            weights_TS = F.pad(weights_TS, (0, 0, 0, missing))
        pieces = zip(x_TD.split(_MOST_ROWS), experts_TS.split(_MOST_ROWS), weights_TS.split(_MOST_ROWS), strict=True)
        mixed = [self._visit(*piece, gate_up_EJD, down_EDI) for piece in pieces]
        return (mixed[0] if len(mixed) == 1 else torch.cat(mixed))[:num_here]

    def _visit(
        self, x_ND: Tensor, experts_NS: Tensor, weights_NS: Tensor, gate_up_EJD: Tensor, down_EDI: Tensor
    ) -> Tensor:
        x_GD, experts_GS, weights_GS = all_gather_together((x_ND, experts_NS, weights_NS), self.group)
        here_GS = experts_GS - self.first_expert
        compute = decode_experts if len(x_GD) <= MOST_TOKENS else local_experts
        sums_GD = compute(x_GD, here_GS, weights_GS, gate_up_EJD, down_EDI, torch.float32)
        return reduce_scatter_rows(sums_GD, self.group).to(x_ND.dtype)


class Peers:
    """The ranks that sample together, as one of them sees them: what they agree on before every pass.

    They agree by messages between hosts, which wait for no GPU.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._experts = [module for module in model.modules() if isinstance(module, Experts)]
        self._width, self._slots = model.config.hidden_size, model.config.num_experts_per_tok

    def most(self, *counts: int) -> list[int]:
        """The largest of all ranks' counts, one by one, on each of them."""
        mine = torch.tensor(counts)
        dist.all_reduce(mine, dist.ReduceOp.MAX)
        return mine.tolist()

    @contextmanager
    def exchanging(self, num_rows: int) -> Iterator[None]:
        """A pass in which every rank exchanges so many rows, whether it has them or not."""
        visits = [experts.compute for experts in self._experts if isinstance(experts.compute, VisitExperts)]
        assert len(visits) == len(self._experts), "these experts serve one rank only"
        for visit in visits:
            visit.num_rows = num_rows
        try:
            yield
        finally:
            for visit in visits:
                visit.num_rows = None

    def serve(self) -> None:
        """Take part in a pass without rows of one's own."""
        for experts in self._experts:
            weight = experts.gate_up_proj
            x_TD, weights_TS = weight.new_zeros((0, self._width)), weight.new_zeros((0, self._slots))
            experts(x_TD, torch.zeros((0, self._slots), dtype=torch.int64, device=weight.device), weights_TS)
