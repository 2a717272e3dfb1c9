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
        s.num_computed_tokens = len(s.tokens)
        s.tokens.append(7)


def test_requests_are_admitted_in_the_order_of_their_streams_not_of_their_arrival() -> None:
    scheduler = make_scheduler(max_running=2)
    for number in (3, 1, 2):
        scheduler.add(sequence(number))
    assert [s.stream for s in scheduler.schedule()] == [(0, 1), (0, 2)]


def test_new_requests_are_prefilled_before_running_ones_decode() -> None:
    scheduler = make_scheduler()
    scheduler.add(sequence(1))
    compute(scheduler.schedule())
    scheduler.add(sequence(2))
    prefill = scheduler.schedule()
    assert [s.stream for s in prefill] == [(0, 2)]
    compute(prefill)
    assert [s.stream for s in scheduler.schedule()] == [(0, 1), (0, 2)]


def test_a_prefill_stays_within_its_tokens_unless_one_prompt_alone_exceeds_them() -> None:
    scheduler = make_scheduler(max_prefill_tokens=12)
    for number, length in enumerate([20, 6, 6, 6]):
        scheduler.add(sequence(number, length))
    sizes = []
    while scheduler.waiting:
        admitted = scheduler.schedule()
        sizes.append([len(s.prompt) for s in admitted])
        compute(admitted)
    assert sizes == [[20], [6, 6], [6]]


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


def test_a_request_that_just_fits_the_whole_cache_is_taken() -> None:
    scheduler = make_scheduler(num_blocks=5)
    scheduler.add(sequence(1, prompt_tokens=10, max_new_tokens=10))
    assert len(scheduler.waiting) == 1
