"""Which rows of a pack each rank holds.

A pack is padded with one more document until its rows divide evenly. Context parallelism cuts the rows into twice as
many pieces as it has ranks and gives each rank one piece from the front and its mirror image from the back: later
rows see more keys, so that all ranks have the same work. Sequence parallelism cuts a rank's rows once more, between
its layers' matrices.

T rows of the padded pack, C = T / context ranks, S = C / tensor ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from lockstep.parallel.mesh import Layout


@dataclass(frozen=True)
class Segment:
    """Neighbouring rows of one document which this rank holds, and the keys that the last of them sees."""

    first_row: int
    """Among this rank's rows."""
    num_rows: int
    first_key: int
    """Among the pack's rows: where the document starts."""
    num_keys: int


class RankRows:
    """The rows of one pack, seen from one rank."""

    def __init__(self, lengths: list[int], layout: Layout, cp_rank: int, tp_rank: int, device: torch.device) -> None:
        total = sum(lengths)
        padding = -total % layout.row_multiple if total else layout.row_multiple
        self.lengths = [*lengths, padding] if padding else list(lengths)
        self.num_rows = total + padding
        self.device = device
        self._cp_size, self._cp_rank = layout.cp_size, cp_rank
        self.context_C = self._rows_of(cp_rank)
        self.sequence_S = self.context_C.chunk(layout.tp_size)[tp_rank]

    @cached_property
    def place_T(self) -> Tensor:
        """Where each row of the pack stands in `context_C`; -1 where another rank holds it."""
        places = torch.full((self.num_rows,), -1, device=self.device)
        places[self.context_C] = torch.arange(len(self.context_C), device=self.device)
        return places

    @cached_property
    def rank_order_T(self) -> Tensor:
        """The pack's rows as they stand when all ranks' rows are put one after the other."""
        return torch.cat([self._rows_of(rank) for rank in range(self._cp_size)])

    @cached_property
    def pack_order_T(self) -> Tensor:
        """The inverse of `rank_order_T`."""
        return self.rank_order_T.argsort()

    @cached_property
    def segments(self) -> list[Segment]:
        starts = [0, *accumulate(self.lengths)]
        found, held = [], 0
        for piece in self._pieces_of(self._cp_rank):
            for start, length in zip(starts, self.lengths, strict=False):
                first, end = max(piece.start, start), min(piece.stop, start + length)
                if first < end:
                    found.append(Segment(held + first - piece.start, end - first, start, end - start))
            held += len(piece)
        return found

    def padded(self, values_T: Tensor, filler: int) -> Tensor:
        """One value per token of the batch, with `filler` for the padding."""
        missing = self.num_rows - len(values_T)
        return torch.cat([values_T, values_T.new_full((missing, *values_T.shape[1:]), filler)])

    def _rows_of(self, cp_rank: int) -> Tensor:
        pieces = [torch.arange(piece.start, piece.stop, device=self.device) for piece in self._pieces_of(cp_rank)]
        return torch.cat(pieces)

    def _pieces_of(self, cp_rank: int) -> list[range]:
        if self._cp_size == 1:
            return [range(self.num_rows)]
        size = self.num_rows // (2 * self._cp_size)
        return [range(piece * size, (piece + 1) * size) for piece in (cp_rank, 2 * self._cp_size - 1 - cp_rank)]
