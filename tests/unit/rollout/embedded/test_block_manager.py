from __future__ import annotations

import random
from collections import Counter

import pytest

from lockstep.rollout.embedded.block_manager import BlockManager
from lockstep.rollout.embedded.sequence import Sequence
from lockstep.rollout.engine import SamplingParams


def sequence(tokens: list[int]) -> Sequence:
    return Sequence(tokens, SamplingParams(max_new_tokens=50), (0,), 0)


def begin(blocks: BlockManager, tokens: list[int]) -> Sequence:
    """A sequence that is about to be computed whole."""
    made = sequence(tokens)
    assert blocks.allocate(made)
    schedule(blocks, made)
    return made


def schedule(blocks: BlockManager, made: Sequence, num_tokens: int | None = None) -> None:
    made.num_scheduled_tokens = made.num_uncomputed_tokens if num_tokens is None else num_tokens
    blocks.key_full_blocks(made)


def computed(*sequences: Sequence) -> None:
    """What the runner does to its sequences."""
    for s in sequences:
        s.num_computed_tokens += s.num_scheduled_tokens
        s.num_scheduled_tokens = 0


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


def test_what_has_to_stay_free_is_not_given_away() -> None:
    blocks = BlockManager(4, 4)
    one = sequence([1, 2, 3, 4, 5])
    assert not blocks.allocate(one, spare=3)
    assert blocks.allocate(one, spare=2)


@pytest.mark.parametrize(("length", "shared"), [(8, 4), (9, 8), (12, 8), (13, 12), (3, 0)])
def test_equal_prefixes_share_whole_blocks_but_the_last_token_is_always_computed(length: int, shared: int) -> None:
    blocks = BlockManager(16, 4)
    first, second = begin(blocks, list(range(length))), begin(blocks, list(range(length)))
    assert (first.num_computed_tokens, second.num_computed_tokens) == (0, shared)
    assert first.block_table[: shared // 4] == second.block_table[: shared // 4]
    assert set(first.block_table[shared // 4 :]).isdisjoint(second.block_table[shared // 4 :])


def test_only_blocks_that_the_pass_fills_are_shared() -> None:
    """A chunk of 6 of 13 tokens fills one block of 4; the blocks after it are given, but hold nothing yet."""
    blocks = BlockManager(16, 4)
    first = sequence(list(range(13)))
    blocks.allocate(first)
    schedule(blocks, first, 6)
    assert begin(blocks, list(range(13))).num_computed_tokens == 4
    computed(first)
    schedule(blocks, first, 6)
    assert begin(blocks, list(range(13))).num_computed_tokens == 12


def test_what_two_computed_alike_has_one_continuation() -> None:
    """The second computes the same, unshared; what follows is found through the first one's blocks."""
    blocks = BlockManager(16, 4)
    first, second = sequence(list(range(8))), sequence(list(range(8)))
    assert blocks.allocate(first)
    assert blocks.allocate(second)
    schedule(blocks, first)
    schedule(blocks, second)
    computed(first, second)
    second.tokens += [8, 9, 10, 11, 12]
    assert blocks.grow(second)
    assert blocks.grow(second)
    schedule(blocks, second, 4)
    third = begin(blocks, list(range(13)))
    assert third.num_computed_tokens == 12
    assert third.block_table[:3] == [*first.block_table[:2], second.block_table[2]]


def test_equal_blocks_after_different_beginnings_are_not_shared() -> None:
    blocks = BlockManager(16, 4)
    begin(blocks, [1, 1, 1, 1, 5, 6, 7, 8, 9])
    assert begin(blocks, [2, 2, 2, 2, 5, 6, 7, 8, 9]).num_computed_tokens == 0


def test_a_released_prefix_is_found_again_until_its_block_is_handed_out() -> None:
    blocks = BlockManager(4, 4)
    blocks.release(begin(blocks, list(range(9))))
    again = begin(blocks, list(range(9)))
    assert again.num_computed_tokens == 8
    blocks.release(again)
    blocks.release(begin(blocks, list(range(100, 116))))
    assert begin(blocks, list(range(9))).num_computed_tokens == 0


def test_the_beginning_of_a_released_prefix_lives_longest() -> None:
    blocks = BlockManager(5, 4)
    blocks.release(begin(blocks, list(range(13))))
    begin(blocks, list(range(100, 108)))
    assert begin(blocks, list(range(9))).num_computed_tokens == 8


def test_generated_tokens_are_shared_too_once_their_block_is_full() -> None:
    """A second turn continues where the first ended."""
    blocks = BlockManager(8, 4)
    first = begin(blocks, [1, 2, 3])
    for token in (4, 5):
        computed(first)
        first.tokens.append(token)
        blocks.grow(first)
        schedule(blocks, first)
    assert begin(blocks, [1, 2, 3, 4, 5]).num_computed_tokens == 4


def test_a_token_that_is_still_on_the_device_has_its_place_but_is_not_shared() -> None:
    blocks = BlockManager(8, 4)
    first = begin(blocks, [1, 2, 3, 4])
    computed(first)
    first.num_pending_tokens = 1
    assert blocks.grow(first)
    assert len(first.block_table) == 2
    schedule(blocks, first)
    assert begin(blocks, [1, 2, 3, 4, 5]).num_computed_tokens == 4


def test_nothing_is_shared_across_a_change_of_weights() -> None:
    blocks = BlockManager(8, 4)
    blocks.release(begin(blocks, list(range(9))))
    blocks.forget_prefixes()
    again = begin(blocks, list(range(9)))
    assert again.num_computed_tokens == 0
    assert again.block_table == [0, 1, 2]


# States


def begin_with_state(blocks: BlockManager, tokens: list[int]) -> Sequence:
    """The whole blocks of the prompt are computed, and the state after them is kept."""
    made = sequence(tokens)
    assert blocks.allocate(made)
    schedule(blocks, made, blocks.shareable_tokens(made) - made.num_computed_tokens)
    if made.num_scheduled_tokens:
        blocks.keep_state(made)
    return made


def test_with_a_state_a_prefix_is_shared_up_to_where_its_state_is_kept() -> None:
    blocks = BlockManager(16, 4, num_state_slots=8)
    first = begin_with_state(blocks, list(range(10)))
    assert first.state_copy == 8
    assert blocks.shares_more_soon(sequence(list(range(10))))
    blocks.begin_pass()
    computed(first)
    schedule(blocks, first)
    second, longer, shorter = (sequence(list(range(length))) for length in (10, 30, 8))
    assert not blocks.shares_more_soon(second)
    assert [blocks.allocate(s) for s in (second, longer, shorter)] == [True] * 3
    assert [s.num_computed_tokens for s in (second, longer, shorter)] == [8, 8, 0]
    assert [s.state_source for s in (second, longer, shorter)] == [8, 8, -1]
    assert len({s.state_slot for s in (first, second, longer, shorter)}) == 4


def test_the_least_recently_used_state_makes_room_but_none_of_this_pass() -> None:
    blocks = BlockManager(64, 4, num_state_slots=16)  # 2 rows
    prompts = [[100 * number + i for i in range(5)] for number in range(3)]
    for prompt in prompts[:2]:
        blocks.release(begin_with_state(blocks, prompt))
    assert not blocks.can_keep_state
    blocks.begin_pass()
    assert blocks.can_keep_state
    blocks.release(begin_with_state(blocks, prompts[0]))  # used again
    blocks.begin_pass()
    blocks.release(begin_with_state(blocks, prompts[2]))
    found = []
    for prompt in prompts:
        s = sequence(prompt)
        blocks.allocate(s)
        found.append(s.num_computed_tokens)
        blocks.release(s)
    assert found == [4, 0, 4]
    blocks.check_integrity()


def test_no_state_is_kept_across_a_change_of_weights() -> None:
    blocks = BlockManager(8, 4, num_state_slots=8)
    blocks.release(begin_with_state(blocks, list(range(9))))
    blocks.forget_prefixes()
    again = sequence(list(range(9)))
    blocks.allocate(again)
    assert (again.num_computed_tokens, again.state_source) == (0, -1)
    blocks.release(again)
    blocks.check_integrity()


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
                schedule(blocks, s)
                computed(s)
                remember(s, shared)
                alive.append(s)
        elif action < 0.75 and alive:
            s = draw.choice(alive)
            s.tokens.append(draw.randrange(2))
            if blocks.grow(s):
                schedule(blocks, s)
                computed(s)
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
