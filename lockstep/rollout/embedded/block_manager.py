"""Blocks of the paged cache, and rows of recurrent states: who holds which, and which hold a prefix worth sharing."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

from lockstep.rollout.embedded.sequence import Sequence


def num_snapshots(num_state_slots: int) -> int:
    """Rows of recurrent states that are kept for sharing, beside one for each running sequence."""
    return -(-num_state_slots // 8)


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
        num_state_slots: for models with recurrent layers, how many sequences may hold a state; 0 for models of
            attention alone. Further rows, `num_snapshots` of them, keep copies of states at ends of blocks: such
            sequences share a prefix up to where there is one. The least recently used copy makes room for a new one.
    """

    def __init__(self, num_blocks: int, block_size: int, *, num_state_slots: int = 0) -> None:
        self.block_size = block_size
        self.num_state_slots = num_state_slots
        self._free_slots = list(range(num_state_slots))
        self._blocks = [_Block(i) for i in range(num_blocks)]
        self._free: deque[int] = deque(range(num_blocks))
        self._by_key: dict[tuple[int, tuple[int, ...]], int] = {}
        self._next_serial = 1
        self._free_rows = self._snapshot_rows()
        self._snapshots: OrderedDict[int, int] = OrderedDict()
        """Serial of the last block of a prefix -> row of the state after it; the least recently used first."""
        self._in_the_making: set[int] = set()
        """Serials of copies that the coming pass makes."""

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def begin_pass(self) -> None:
        """What the last pass made is there."""
        self._in_the_making.clear()

    def allocate(self, sequence: Sequence, *, spare: int = 0) -> bool:
        """Give the sequence blocks for all its tokens; False, and nothing changed, when they do not suffice.

        Sets `num_computed_tokens` to what the prefix cache already holds, at most all but the last token, and where
        there is a state to go on from, `state_source`.

        Args:
            spare: blocks that have to stay free.
        """
        shared, row = self._shared_prefix(sequence.tokens)
        from_free = self.blocks_for(len(sequence.tokens)) - sum(self._blocks[i].holders > 0 for i in shared)
        if from_free + spare > self.num_free or (self.num_state_slots and not self._free_slots):
            return False
        if self.num_state_slots:
            sequence.state_slot = self._free_slots.pop()
            sequence.state_source = row
        for block_id in shared:
            self._hold(block_id)
        sequence.block_table = list(shared)
        sequence.num_keyed_blocks = len(shared)
        sequence.num_computed_tokens = len(shared) * self.block_size
        while len(sequence.block_table) < self.blocks_for(len(sequence.tokens)):
            sequence.block_table.append(self._take_free())
        return True

    def grow(self, sequence: Sequence) -> bool:
        """Make room for the sequence's last token; False when a new block is needed and none is free."""
        if self.blocks_for(sequence.length) > len(sequence.block_table):
            if not self._free:
                return False
            sequence.block_table.append(self._take_free())
        return True

    def key_full_blocks(self, sequence: Sequence) -> None:
        """Let others find the blocks that are full when the coming pass is done."""
        computed = min(len(sequence.tokens), sequence.num_computed_tokens + sequence.num_scheduled_tokens)
        for i in range(sequence.num_keyed_blocks, computed // self.block_size):
            parent = self._blocks[sequence.block_table[i - 1]].serial if i else 0
            key = (parent, tuple(sequence.tokens[i * self.block_size : (i + 1) * self.block_size]))
            block = self._blocks[sequence.block_table[i]]
            if key in self._by_key:
                block.serial = self._blocks[self._by_key[key]].serial
            else:
                block.serial = self._next_serial
                self._next_serial += 1
                self._by_key[key] = block.id
                block.key = key
            sequence.num_keyed_blocks = i + 1

    def shareable_tokens(self, sequence: Sequence) -> int:
        """Of a sequence with a state: the whole blocks of its prompt, after which siblings and later turns go on."""
        return (len(sequence.prompt) - 1) // self.block_size * self.block_size if self.num_state_slots else 0

    def keep_state(self, sequence: Sequence) -> None:
        """Have the state after the coming pass, which ends with a full block, copied to a row; set in `state_copy`."""
        end = sequence.num_computed_tokens + sequence.num_scheduled_tokens
        assert end % self.block_size == 0, "states are shared at ends of blocks"
        serial = self._blocks[sequence.block_table[end // self.block_size - 1]].serial
        if serial in self._snapshots:
            return
        if not self._free_rows:
            _, row = self._snapshots.popitem(last=False)
            self._free_rows.append(row)
        sequence.state_copy = self._snapshots[serial] = self._free_rows.pop()
        self._in_the_making.add(serial)

    @property
    def can_keep_state(self) -> bool:
        """Whether there is a row for another copy: one that the coming pass makes is not thrown away before."""
        return bool(self._free_rows) or len(self._in_the_making) < len(self._snapshots)

    def shares_more_soon(self, sequence: Sequence) -> bool:
        """Whether the coming pass makes a state that this waiting sequence would rather go on from."""
        if not self._in_the_making:
            return False
        found = self._found_blocks(sequence.tokens)
        return any(self._blocks[i].serial in self._in_the_making for i in found)

    def release(self, sequence: Sequence) -> None:
        """Take the sequence's blocks back; deepest first, so that shared prefixes live longest."""
        for block_id in reversed(sequence.block_table):
            block = self._blocks[block_id]
            block.holders -= 1
            if block.holders == 0:
                self._free.append(block_id)
        sequence.block_table = []
        sequence.has_routes = False
        sequence.num_keyed_blocks = sequence.num_computed_tokens = sequence.num_scheduled_tokens = 0
        if self.num_state_slots:
            self._free_slots.append(sequence.state_slot)
            sequence.state_slot = sequence.state_source = sequence.state_copy = -1

    def forget_prefixes(self) -> None:
        """Empty the prefix cache (the weights changed). Blocks in use stay with their sequences, unshared."""
        self._by_key.clear()
        for block in self._blocks:
            block.key = None
        self._free = deque(sorted(self._free))
        self._free_slots.sort()
        self._snapshots.clear()
        self._in_the_making.clear()
        self._free_rows = self._snapshot_rows()

    def check_integrity(self) -> None:
        """Invariants when no sequence is alive: every block and row is free, once, but for rows of kept states."""
        assert sorted(self._free) == list(range(self.num_blocks)), "a block leaked or was freed twice"
        assert all(block.holders == 0 for block in self._blocks), "a block is held by nobody alive"
        assert sorted(self._free_slots) == list(range(self.num_state_slots)), "a state slot leaked or was freed twice"
        rows = sorted([*self._free_rows, *self._snapshots.values()])
        assert rows == self._snapshot_rows(), "a row for a kept state leaked or was given twice"

    def _snapshot_rows(self) -> list[int]:
        return list(range(self.num_state_slots, self.num_state_slots + num_snapshots(self.num_state_slots)))

    def _shared_prefix(self, tokens: list[int]) -> tuple[list[int], int]:
        """Blocks to go on from, and the row of the state after them: -1 without, or for models without states."""
        found = self._found_blocks(tokens)
        if not self.num_state_slots:
            return found, -1
        while found and (self._blocks[found[-1]].serial not in self._snapshots):
            found.pop()
        if not found:
            return found, -1
        serial = self._blocks[found[-1]].serial
        self._snapshots.move_to_end(serial)
        return found, self._snapshots[serial]

    def _found_blocks(self, tokens: list[int]) -> list[int]:
        """Blocks that hold the beginning of these tokens, all but the last."""
        found: list[int] = []
        parent = 0
        for start in range(0, len(tokens) - self.block_size, self.block_size):
            block_id = self._by_key.get((parent, tuple(tokens[start : start + self.block_size])))
            if block_id is None:
                break
            found.append(block_id)
            parent = self._blocks[block_id].serial
        return found

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
