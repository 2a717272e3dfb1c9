from __future__ import annotations

import pytest

from lockstep.errors import RolloutError
from lockstep.rollout.embedded.block_manager import BlockManager
from lockstep.rollout.embedded.scheduler import Scheduler
from lockstep.rollout.embedded.sequence import Sequence
from lockstep.rollout.engine import SamplingParams


def make_scheduler(num_blocks: int = 16, max_running: int = 8, max_prefill_tokens: int = 64) -> Scheduler:
    return Scheduler(BlockManager(num_blocks, 4), max_running=max_running, max_prefill_tokens=max_prefill_tokens)


def sequence(number: int, prompt_tokens: int = 5, max_new_tokens: int = 8) -> Sequence:
    prompt = [100 * number + i for i in range(prompt_tokens)]
    return Sequence(prompt, SamplingParams(max_new_tokens=max_new_tokens), (0, number), number)


def compute(scheduled: list[Sequence]) -> None:
    """What the runner does to its sequences."""
    for s in scheduled:
        ends = s.samples_next
        s.num_computed_tokens += s.num_scheduled_tokens
        s.num_scheduled_tokens = 0
        s.state_source = s.state_copy = -1
        if ends:
            s.tokens.append(7)


def shares(scheduled: list[Sequence]) -> list[tuple[int, int]]:
    """(number, tokens of this pass) of each."""
    return [(s.stream[1], s.num_scheduled_tokens) for s in scheduled]


def test_requests_are_admitted_in_the_order_of_their_streams_not_of_their_arrival() -> None:
    scheduler = make_scheduler(max_running=2)
    for number in (3, 1, 2):
        scheduler.add(sequence(number))
    assert [s.stream for s in scheduler.schedule()] == [(0, 1), (0, 2)]


def test_new_requests_are_prefilled_while_running_ones_decode() -> None:
    scheduler = make_scheduler()
    scheduler.add(sequence(1))
    compute(scheduler.schedule())
    scheduler.add(sequence(2))
    scheduled = scheduler.schedule()
    assert shares(scheduled) == [(1, 1), (2, 5)]
    compute(scheduled)
    assert shares(scheduler.schedule()) == [(1, 1), (2, 1)]


def test_prompts_come_in_chunks_of_the_budget_while_others_decode() -> None:
    scheduler = make_scheduler(max_prefill_tokens=12)
    for number, length in enumerate([6, 20, 6, 6]):
        scheduler.add(sequence(number, length))
    passes = []
    for _ in range(4):
        scheduled = scheduler.schedule()
        passes.append(shares(scheduled))
        compute(scheduled)
    assert passes == [
        [(0, 6), (1, 6)],
        [(0, 1), (1, 12)],
        [(0, 1), (1, 2), (2, 6), (3, 4)],
        [(0, 1), (1, 1), (2, 1), (3, 2)],
    ]
    assert [s.num_new_tokens for s in scheduler.running] == [4, 2, 2, 1]


def test_a_chunk_is_shared_when_it_is_computed_and_the_rest_is_not_computed_twice() -> None:
    """Two samples of one prompt of 20 tokens: the second waits for the budget, and then finds all whole blocks."""
    scheduler = make_scheduler(max_prefill_tokens=12)
    prompt = list(range(20))
    for index in range(2):
        scheduler.add(Sequence(list(prompt), SamplingParams(max_new_tokens=4), (0, index), index))
    first = scheduler.schedule()
    assert shares(first) == [(0, 12)]
    compute(first)
    assert shares(scheduler.schedule()) == [(0, 8), (1, 4)]


def test_siblings_with_states_wait_one_pass_for_the_state_after_their_prompt() -> None:
    scheduler = Scheduler(BlockManager(32, 4, num_state_slots=8), max_running=8, max_prefill_tokens=64)
    prompts = [[7 * group + i for i in range(10)] for group in (0, 1)]
    for number in range(6):
        scheduler.add(Sequence(list(prompts[number // 3]), SamplingParams(max_new_tokens=4), (0, number), number))
    passes = []
    for _ in range(3):
        scheduled = scheduler.schedule()
        passes.append(shares(scheduled))
        compute(scheduled)
    # One row for kept states: the second group's first sample is computed without.
    assert passes == [[(0, 8), (3, 10), (4, 10), (5, 10)], [(3, 1), (4, 1), (5, 1), (0, 2), (1, 2), (2, 2)], passes[2]]
    assert len(passes[2]) == 6


def test_when_blocks_run_out_the_youngest_makes_room_and_comes_back_first_in_line_of_its_stream() -> None:
    scheduler = make_scheduler(num_blocks=5)
    for number in (1, 2):
        scheduler.add(sequence(number, prompt_tokens=7))
    compute(scheduler.schedule())  # 4 of 5 blocks, both full
    scheduler.add(sequence(3, prompt_tokens=7))
    scheduled = scheduler.schedule()  # no room for 3, both decode into the last places
    assert [s.stream for s in scheduled] == [(0, 1), (0, 2)]
    compute(scheduled)
    scheduled = scheduler.schedule()
    assert [s.stream for s in scheduled] == [(0, 1)]
    assert scheduler.num_preemptions == 1
    assert [s.stream for s in scheduler.waiting] == [(0, 2), (0, 3)]
    preempted = scheduler.waiting[0]
    assert (preempted.num_computed_tokens, preempted.block_table, len(preempted.tokens)) == (0, [], 9)


def test_every_request_finishes_though_only_one_fits_at_a_time() -> None:
    scheduler = make_scheduler(num_blocks=5)
    sequences = [sequence(number, prompt_tokens=4, max_new_tokens=16) for number in range(4)]
    for s in sequences:
        scheduler.add(s)
    for _ in range(200):
        scheduled = scheduler.schedule()
        compute(scheduled)
        for s in scheduled:
            if s.num_new_tokens == 16:
                scheduler.finish(s)
        if not (scheduler.running or scheduler.waiting):
            break
        assert scheduled, "a pass without work would go on for ever"
    assert [s.num_new_tokens for s in sequences] == [16] * 4
    scheduler.blocks.check_integrity()


@pytest.mark.parametrize(
    ("request_", "named", "value"),
    [
        (sequence(1, prompt_tokens=10, max_new_tokens=11), "--rollout-max-tokens", 20),
        (sequence(1, prompt_tokens=0), "prompt", []),
        (sequence(1, max_new_tokens=0), "sampling_params['max_new_tokens']", 0),
    ],
)
def test_a_request_that_can_never_run_is_refused_by_name(request_: Sequence, named: str, value: object) -> None:
    scheduler = make_scheduler(num_blocks=5)
    with pytest.raises(RolloutError) as raised:
        scheduler.add(request_)
    assert (raised.value.field, raised.value.value) == (named, value)
    assert scheduler.waiting == []


def test_the_first_in_line_never_gives_way_and_the_number_of_passes_is_bounded() -> None:
    """Six of 24 tokens in the room of two and a half: none is sent back again and again."""
    scheduler = make_scheduler(num_blocks=15)
    sequences = [sequence(number, prompt_tokens=8, max_new_tokens=16) for number in range(6)]
    for s in reversed(sequences):
        scheduler.add(s)
    finished, num_passes = [], 0
    while scheduler.running or scheduler.waiting:
        scheduled = scheduler.schedule()
        assert sequences[len(finished)] in scheduled, "the first of those that are left always goes on"
        compute(scheduled)
        for s in [s for s in scheduled if s.num_new_tokens == 16]:
            scheduler.finish(s)
            finished.append(s)
        num_passes += 1
    assert finished == sequences
    assert num_passes < 6 * 16
    assert scheduler.num_preemptions <= 6
    scheduler.blocks.check_integrity()


def test_a_new_sequence_leaves_a_block_for_every_running_one() -> None:
    scheduler = make_scheduler(num_blocks=6)
    for number in range(3):
        scheduler.add(sequence(number, prompt_tokens=4))
    assert shares(scheduler.schedule()) == [(0, 4), (1, 4), (2, 4)]
    scheduler = make_scheduler(num_blocks=4)
    for number in range(3):
        scheduler.add(sequence(number, prompt_tokens=4))
    assert shares(scheduler.schedule()) == [(0, 4), (1, 4)], "of two blocks that are left, the third would take one"


def test_the_last_in_line_gives_way_to_a_sequence_that_comes_before_it_though_it_began_earlier() -> None:
    scheduler = make_scheduler(num_blocks=6)
    scheduler.add(sequence(2, prompt_tokens=8))
    compute(scheduler.schedule())
    scheduler.add(sequence(1, prompt_tokens=7))
    while not scheduler.num_preemptions:
        compute(scheduler.schedule())
    assert [s.stream for s in scheduler.running] == [(0, 1)]
    assert [s.stream for s in scheduler.waiting] == [(0, 2)]


# Results that come one pass late


def test_a_pass_may_be_chosen_before_the_tokens_of_the_last_one_are_read() -> None:
    """The last token is known to be the last without being read; a sequence that was sent back waits for its own."""
    scheduler = make_scheduler()
    one = sequence(1, prompt_tokens=4, max_new_tokens=3)
    scheduler.add(one)
    lengths = []
    for _ in range(5):
        scheduled = scheduler.schedule()
        for _ in range(one.num_pending_tokens):  # what the last pass has sampled arrives
            one.tokens.append(7)
            one.num_pending_tokens -= 1
        lengths.append(shares(scheduled))
        for s in scheduled:
            s.num_computed_tokens += s.num_scheduled_tokens
            s.num_pending_tokens += 1
    assert lengths == [[(1, 4)], [(1, 1)], [(1, 1)], [], []]
    assert (one.num_new_tokens, one.num_computed_tokens) == (3, 6)
    scheduler._preempt(one)
    one.num_pending_tokens = 1
    assert scheduler.schedule() == []
    one.num_pending_tokens = 0
    assert shares(scheduler.schedule()) == [(1, 3)], "7 tokens, of which a whole block of 4 is found"


def test_a_request_that_just_fits_the_whole_cache_is_taken() -> None:
    scheduler = make_scheduler(num_blocks=5)
    scheduler.add(sequence(1, prompt_tokens=10, max_new_tokens=10))
    assert len(scheduler.waiting) == 1
