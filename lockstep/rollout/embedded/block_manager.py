"""Blocks of the paged cache: who holds which, and which hold a prefix worth sharing."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from lockstep.rollout.embedded.sequence import Sequence


@dataclass
class _Block:
    id: int
    holders: int = 0
    key: tuple[int, tuple[int, ...]] | None = None
    """(serial of the block before it, its tokens): exact, so equal keys mean equal prefixes."""
    serial: int = 0
    """Unique for each content; children name their parent by it, never by the reusable id."""


class BlockManager:
    """Hands out blocks of `block_size` token slots and shares full blocks between sequences with equal prefixes.

    A freed block keeps its content until it is handed out again, least recently freed first.

    Args:
        num_state_slots: for models with recurrent layers, how many sequences may hold a state. Their state after a
            shared prefix is not kept, so such sequences share no blocks. 0 for models of attention alone.
    """

    def __init__(self, num_blocks: int, block_size: int, *, num_state_slots: int = 0) -> None:
        self.block_size = block_size
        self.num_state_slots = num_state_slots
        self._free_slots = list(range(num_state_slots))
        self._blocks = [_Block(i) for i in range(num_blocks)]
        self._free: deque[int] = deque(range(num_blocks))
        self._by_key: dict[tuple[int, tuple[int, ...]], int] = {}
        self._next_serial = 1

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, sequence: Sequence) -> bool:
        """Give the sequence blocks for all its tokens; False, and nothing changed, when they do not suffice.

        Sets `num_computed_tokens` to what the prefix cache already holds, at most all but the last token.
        """
        shared = self._shared_prefix(sequence.tokens)
        from_free = self.blocks_for(len(sequence.tokens)) - sum(self._blocks[i].holders > 0 for i in shared)
        if from_free > self.num_free or (self.num_state_slots and not self._free_slots):
            return False
        if self.num_state_slots:
            sequence.state_slot = self._free_slots.pop()
        for block_id in shared:
            self._hold(block_id)
        sequence.block_table = list(shared)
        sequence.num_computed_tokens = len(shared) * self.block_size
        while len(sequence.block_table) < self.blocks_for(len(sequence.tokens)):
            sequence.block_table.append(self._take_free())
        self._register_full_blocks(sequence, first=len(shared))
        return True

    def grow(self, sequence: Sequence) -> bool:
        """Make room for the sequence's last token; False when a new block is needed and none is free."""
        if self.blocks_for(len(sequence.tokens)) > len(sequence.block_table):
            if not self._free:
                return False
            sequence.block_table.append(self._take_free())
        if len(sequence.tokens) % self.block_size == 0:
            self._register_full_blocks(sequence, first=len(sequence.block_table) - 1)
        return True

    def release(self, sequence: Sequence) -> None:
        """Take the sequence's blocks back; deepest first, so that shared prefixes live longest."""
        for block_id in reversed(sequence.block_table):
            block = self._blocks[block_id]
            block.holders -= 1
            if block.holders == 0:
                self._free.append(block_id)
        sequence.block_table = []
        sequence.num_computed_tokens = 0
        if self.num_state_slots:
            self._free_slots.append(sequence.state_slot)
            sequence.state_slot = -1

    def forget_prefixes(self) -> None:
        """Empty the prefix cache (the weights changed). Blocks in use stay with their sequences, unshared."""
        self._by_key.clear()
        for block in self._blocks:
            block.key = None
        self._free = deque(sorted(self._free))

    def check_integrity(self) -> None:
        """Invariants when no sequence is alive: every block is free, once."""
        assert sorted(self._free) == list(range(self.num_blocks)), "a block leaked or was freed twice"
        assert all(block.holders == 0 for block in self._blocks), "a block is held by nobody alive"
        assert sorted(self._free_slots) == list(range(self.num_state_slots)), "a state slot leaked or was freed twice"

    def _shared_prefix(self, tokens: list[int]) -> list[int]:
        found: list[int] = []
        if self.num_state_slots:
            return found
        parent = 0
        for start in range(0, len(tokens) - self.block_size, self.block_size):
            block_id = self._by_key.get((parent, tuple(tokens[start : start + self.block_size])))
            if block_id is None:
                break
            found.append(block_id)
            parent = self._blocks[block_id].serial
        return found

    def _register_full_blocks(self, sequence: Sequence, first: int) -> None:
        for i in range(first, len(sequence.tokens) // self.block_size):
            parent = self._blocks[sequence.block_table[i - 1]].serial if i else 0
            key = (parent, tuple(sequence.tokens[i * self.block_size : (i + 1) * self.block_size]))
            block = self._blocks[sequence.block_table[i]]
            block.serial = self._next_serial
            self._next_serial += 1
            if key not in self._by_key:
                self._by_key[key] = block.id
                block.key = key

    def _hold(self, block_id: int) -> None:
        block = self._blocks[block_id]
        if block.holders == 0:
            self._free.remove(block_id)
        block.holders += 1

    def _take_free(self) -> int:
        block = self._blocks[self._free.popleft()]
        if block.key is not None:
            del self._by_key[block.key]
            block.key = None
        block.holders = 1
        return block.id
