from __future__ import annotations

import random
from collections import Counter

import pytest

from lockstep.rollout.embedded.block_manager import BlockManager
from lockstep.rollout.embedded.sequence import Sequence
from lockstep.rollout.engine import SamplingParams


def sequence(tokens: list[int]) -> Sequence:
    return Sequence(tokens, SamplingParams(max_new_tokens=50), (0,), 0)


def test_a_sequence_gets_a_block_for_every_started_block_of_tokens() -> None:
    blocks = BlockManager(4, 4)
    one = sequence(list(range(9)))
    assert blocks.allocate(one)
    assert (len(one.block_table), blocks.num_free) == (3, 1)
    for token in range(3):
        one.tokens.append(token)
        assert blocks.grow(one)
    assert len(one.block_table) == 3
    one.tokens.append(3)
    assert blocks.grow(one)
    assert (len(one.block_table), blocks.num_free) == (4, 0)
    blocks.release(one)
    blocks.check_integrity()


def test_what_does_not_fit_changes_nothing() -> None:
    blocks = BlockManager(4, 4)
    first, second = sequence(list(range(9))), sequence(list(range(50, 59)))
    assert blocks.allocate(first)
    assert not blocks.allocate(second)
    assert (second.block_table, blocks.num_free) == ([], 1)
    first.tokens += [1, 2, 3]
    small = sequence([7, 8])
    assert blocks.allocate(small)
    first.tokens.append(4)
    assert not blocks.grow(first)
    assert len(first.block_table) == 3
    blocks.release(first)
    blocks.release(small)
    blocks.check_integrity()


@pytest.mark.parametrize(("length", "shared"), [(8, 4), (9, 8), (12, 8), (13, 12), (3, 0)])
def test_equal_prefixes_share_whole_blocks_but_the_last_token_is_always_computed(length: int, shared: int) -> None:
    blocks = BlockManager(16, 4)
    first, second = sequence(list(range(length))), sequence(list(range(length)))
    blocks.allocate(first)
    blocks.allocate(second)
    assert (first.num_computed_tokens, second.num_computed_tokens) == (0, shared)
    assert first.block_table[: shared // 4] == second.block_table[: shared // 4]
    assert set(first.block_table[shared // 4 :]).isdisjoint(second.block_table[shared // 4 :])


def test_equal_blocks_after_different_beginnings_are_not_shared() -> None:
    blocks = BlockManager(16, 4)
    blocks.allocate(sequence([1, 1, 1, 1, 5, 6, 7, 8, 9]))
    other = sequence([2, 2, 2, 2, 5, 6, 7, 8, 9])
    blocks.allocate(other)
    assert other.num_computed_tokens == 0


def test_a_released_prefix_is_found_again_until_its_block_is_handed_out() -> None:
    blocks = BlockManager(4, 4)
    first = sequence(list(range(9)))
    blocks.allocate(first)
    blocks.release(first)
    again = sequence(list(range(9)))
    blocks.allocate(again)
    assert again.num_computed_tokens == 8
    blocks.release(again)
    big = sequence(list(range(100, 116)))
    blocks.allocate(big)
    blocks.release(big)
    late = sequence(list(range(9)))
    blocks.allocate(late)
    assert late.num_computed_tokens == 0


def test_the_beginning_of_a_released_prefix_lives_longest() -> None:
    blocks = BlockManager(5, 4)
    first = sequence(list(range(13)))
    blocks.allocate(first)
    blocks.release(first)
    other = sequence(list(range(100, 108)))
    blocks.allocate(other)
    again = sequence(list(range(9)))
    blocks.allocate(again)
    assert again.num_computed_tokens == 8


def test_generated_tokens_are_shared_too_once_their_block_is_full() -> None:
    """A second turn continues where the first ended."""
    blocks = BlockManager(8, 4)
    first = sequence([1, 2, 3])
    blocks.allocate(first)
    for token in (4, 5):
        first.tokens.append(token)
        blocks.grow(first)
    second = sequence([1, 2, 3, 4, 5])
    blocks.allocate(second)
    assert second.num_computed_tokens == 4


def test_nothing_is_shared_across_a_change_of_weights() -> None:
    blocks = BlockManager(8, 4)
    first = sequence(list(range(9)))
    blocks.allocate(first)
    blocks.release(first)
    blocks.forget_prefixes()
    again = sequence(list(range(9)))
    blocks.allocate(again)
    assert again.num_computed_tokens == 0
    assert again.block_table == [0, 1, 2]


@pytest.mark.parametrize("seed", range(4))
def test_random_use_never_loses_or_doubles_a_block_and_shares_true_prefixes_only(seed: int) -> None:
    draw = random.Random(seed)
    blocks = BlockManager(24, 4)
    contents: dict[int, tuple[int, ...]] = {}
    alive: list[Sequence] = []

    def remember(s: Sequence, first: int) -> None:
        for i in range(first, len(s.tokens) // 4):
            contents[s.block_table[i]] = tuple(s.tokens[: 4 * (i + 1)])

    for _ in range(1500):
        action = draw.random()
        if action < 0.3:
            s = sequence([draw.randrange(2) for _ in range(draw.randrange(1, 20))])
            if blocks.allocate(s):
                shared = s.num_computed_tokens // 4
                assert all(contents[s.block_table[i]] == tuple(s.tokens[: 4 * (i + 1)]) for i in range(shared))
                remember(s, shared)
                alive.append(s)
        elif action < 0.75 and alive:
            s = draw.choice(alive)
            s.tokens.append(draw.randrange(2))
            if blocks.grow(s):
                remember(s, len(s.tokens) // 4 - 1 if len(s.tokens) % 4 == 0 else len(s.tokens))
            else:
                s.tokens.pop()
        elif action < 0.98 and alive:
            blocks.release(alive.pop(draw.randrange(len(alive))))
        elif not alive:
            blocks.forget_prefixes()
        held = Counter(block for s in alive for block in s.block_table)
        assert blocks.num_free + len(held) == blocks.num_blocks
        assert all(len(s.block_table) == blocks.blocks_for(len(s.tokens)) for s in alive)
        private = [block for s in alive for block in s.block_table[len(s.tokens) // 4 :]]
        assert all(held[block] == 1 for block in private), "a block that is still written to is shared"
    for s in alive:
        blocks.release(s)
    blocks.check_integrity()
