"""What the device knows of the sequences that are being decoded, so that a step needs nothing from the host.

R rows, one for each running sequence and a spare one at the end, M blocks of a table, N rows of one message.
"""

from __future__ import annotations

from collections.abc import Sequence as Values

import numpy as np
import torch
from torch import Tensor

from lockstep.rollout.embedded.sequence import Sequence

_LEAST_BLOCKS = 64
"""Blocks of the narrowest table."""


class DecodeState:
    """A row for each sequence: its newest token, which is not computed yet, that token's position, and the rest.

    The host keeps a copy of the block tables only, and sends what has changed in them. The spare row is no sequence:
    it pads a batch to the size of a graph.

    Args:
        spare_slot: of recurrent states, one that no sequence is given.
    """

    def __init__(self, num_sequences: int, device: torch.device, *, block_size: int, spare_slot: int) -> None:
        self.device, self.block_size = device, block_size
        self.spare = num_sequences
        rows = num_sequences + 1
        self.tokens_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self.keys_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self.temperatures_R = torch.ones(rows, dtype=torch.float32, device=device)
        self.state_slots_R = torch.full((rows,), spare_slot, dtype=torch.int64, device=device)
        self.block_tables_RM = torch.empty(0)
        self._tables_RM = np.empty((rows, 0), dtype=np.int64)
        self._num_blocks = [0] * rows
        self._table_of: list[list[int]] = [[] for _ in range(rows)]
        """The very list that the row's table came from."""
        self._row_of: dict[Sequence, int] = {}
        self._free = list(range(num_sequences))
        self._widen(_LEAST_BLOCKS)

    @property
    def width(self) -> int:
        """M. It grows with the longest sequence, and then graphs that were captured before are of no use."""
        return self._tables_RM.shape[1]

    def row_of(self, sequence: Sequence) -> int | None:
        """The row that stands at the sequence's last token, if there is one: none after its blocks were taken away."""
        row = self._row_of.get(sequence)
        if row is None or self._table_of[row] is not sequence.block_table or sequence.num_uncomputed_tokens != 1:
            return None
        return row

    def reserve(self, sequences: list[Sequence]) -> bool:
        """Have rows for sequences that are about to get their first token, or to start over.

        Returns:
            whether the block tables had to grow, and lie elsewhere now.
        """
        if len(self._free) < sum(sequence not in self._row_of for sequence in sequences):
            self._take_back(keep=set(sequences))
        for sequence in sequences:
            if sequence not in self._row_of:
                self._row_of[sequence] = self._free.pop()
        longest = max((len(s.prompt) + s.params.max_new_tokens for s in sequences), default=0)
        grows = -(-longest // self.block_size) > self.width
        if grows:
            self._widen(-(-longest // self.block_size))
        return grows

    def begin(self, sequences: list[Sequence], tokens_N: Tensor) -> None:
        """Set the rows of sequences whose next tokens, `tokens_N`, were just sampled."""
        if not sequences:
            return
        rows = [self._row_of[sequence] for sequence in sequences]
        for row, sequence in zip(rows, sequences, strict=True):
            self._tables_RM[row, : len(sequence.block_table)] = sequence.block_table
            self._num_blocks[row] = len(sequence.block_table)
            self._table_of[row] = sequence.block_table
        rows_N, positions_N, keys_N, slots_N, temperatures_N, tables_N = self.send(
            rows,
            [sequence.length for sequence in sequences],
            [sequence.stream_key for sequence in sequences],
            [max(sequence.state_slot, 0) for sequence in sequences],
            np.array([sequence.params.temperature for sequence in sequences]).view(np.int64),
            self._tables_RM[rows].ravel(),
        )
        self.tokens_R.index_copy_(0, rows_N, tokens_N)
        self.positions_R.index_copy_(0, rows_N, positions_N)
        self.keys_R.index_copy_(0, rows_N, keys_N)
        self.state_slots_R.index_copy_(0, rows_N, slots_N)
        self.temperatures_R.index_copy_(0, rows_N, temperatures_N.view(torch.float64).float())
        self.block_tables_RM.index_copy_(0, rows_N, tables_N.view(len(rows), -1).int())

    def rows_with_new_blocks(self, sequences: list[Sequence]) -> tuple[list[int], list[int], list[int]]:
        """Rows of the sequences; places in the flattened tables that have changed, and the blocks that belong there."""
        rows, places, blocks = list[int](), list[int](), list[int]()
        for sequence in sequences:
            row = self._row_of[sequence]
            rows.append(row)
            known, count = self._num_blocks[row], len(sequence.block_table)
            if count > known:
                places += range(row * self.width + known, row * self.width + count)
                blocks += sequence.block_table[known:]
                self._num_blocks[row] = count
        return rows, places, blocks

    def add_blocks(self, places_N: Tensor, blocks_N: Tensor) -> None:
        self.block_tables_RM.view(-1).index_copy_(0, places_N, blocks_N.int())

    def send(self, *parts: Values[int] | np.ndarray) -> list[Tensor]:
        """Whole numbers as tensors on the device, in one copy for which the host does not wait."""
        sizes = [len(part) for part in parts]
        message = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=self.device.type == "cuda")
        np.concatenate([np.asarray(part, dtype=np.int64) for part in parts], out=message.numpy())
        return list(message.to(self.device, non_blocking=True).split(sizes))

    def _take_back(self, keep: set[Sequence]) -> None:
        for sequence, row in list(self._row_of.items()):
            if not sequence.block_table and sequence not in keep:
                del self._row_of[sequence]
                self._free.append(row)

    def _widen(self, least: int) -> None:
        known, width = self._tables_RM, _LEAST_BLOCKS * -(-least // _LEAST_BLOCKS)
        self._tables_RM = np.zeros((len(known), width), dtype=np.int64)
        self._tables_RM[:, : known.shape[1]] = known
        wide_RM = torch.zeros((len(known), width), dtype=torch.int32, device=self.device)
        wide_RM[:, : known.shape[1]] = self.block_tables_RM.view(len(known), known.shape[1])
        self.block_tables_RM = wide_RM
