"""The engines of a group give each request to a rank by its place in the rollout, never by the clock."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from group_targets import Recorder

from lockstep.cluster.engines import GroupEngine, GroupTrainer
from lockstep.cluster.group import WorkerGroup
from lockstep.errors import RolloutError
from lockstep.rollout.engine import SamplingParams
from lockstep.trainer.batch import TrainSample

PARAMS = SamplingParams(max_new_tokens=4)


@pytest.fixture(scope="module")
def group() -> Iterator[WorkerGroup]:
    group = WorkerGroup(2, Recorder, timeout_s=60.0)
    group.wait_for_start()
    yield group
    group.close()


@pytest.fixture(params=[False, True], ids=["each on its own", "together"])
def together(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def sampled(group: WorkerGroup, work: Any, *, together: bool) -> list[list[Any]]:
    """Run the coroutine function on an engine; returns the calls that each rank got in between."""

    async def go() -> None:
        engine = GroupEngine(group, together=together)
        engine.set_version(3)
        await work(engine)
        await engine.drain()

    asyncio.run(go())
    group._detach()
    calls = group.call("take_calls")
    assert all((own[0], own[-1]) == (("begin", 3), "end") for own in calls)
    return [own[1:-1] for own in calls]


def test_samples_of_a_prompt_share_a_rank_and_new_prompts_go_to_the_idlest(group: WorkerGroup, together: bool) -> None:
    """Groups 0 to 3 of 3, 1, 1 and 2 samples, asked for in another order."""
    streams = [(0, 7, group, sample) for group, count in enumerate((3, 1, 1, 2)) for sample in range(count)]
    ranks: dict[tuple[int, ...], int] = {}

    async def one(engine: GroupEngine, stream: tuple[int, ...]) -> None:
        ranks[stream] = (await engine.generate([1], PARAMS, stream)).token_ids[0]

    async def work(engine: GroupEngine) -> None:
        await asyncio.gather(*(one(engine, stream) for stream in reversed(streams)))

    sampled(group, work, together=together)
    assert {stream[2]: rank for stream, rank in ranks.items()} == {0: 0, 1: 1, 2: 1, 3: 1}
    assert len(ranks) == len(streams)


def ranks_of(group: WorkerGroup, waves: list[list[tuple[int, int, int]]], *, together: bool) -> list[list[int]]:
    """The ranks of waves of requests, (session, tokens of the prompt, tokens to come) each; one wave after another."""

    async def one(engine: GroupEngine, session: int, num_prompt: int, num_new: int) -> int:
        answer = await engine.generate([1] * num_prompt, SamplingParams(max_new_tokens=num_new), (0, 0, session))
        return answer.token_ids[0]

    found: list[list[int]] = []

    async def work(engine: GroupEngine) -> None:
        for wave in waves:
            found.append(list(await asyncio.gather(*(one(engine, *request) for request in wave))))

    sampled(group, work, together=together)
    return found


def test_a_new_session_goes_to_the_rank_with_the_fewest_tokens(group: WorkerGroup, together: bool) -> None:
    """One long prompt weighs as much as three short ones."""
    wave = [(0, 90, 10), (1, 5, 30), (2, 5, 30), (3, 5, 30), (4, 5, 30)]
    assert ranks_of(group, [wave], together=together) == [[0, 1, 1, 1, 0]]


def test_a_session_stays_on_its_rank_and_work_that_is_done_counts_no_more(group: WorkerGroup, together: bool) -> None:
    waves = [[(0, 5, 5), (1, 90, 90)], [(1, 5, 5), (2, 50, 50), (3, 5, 5)]]
    assert ranks_of(group, waves, together=together) == [[0, 1], [1, 0, 1]]


def test_what_is_done_counts_no_more_beside_what_is_not_where_ranks_are_at_the_same_step(
    group: WorkerGroup, together: bool
) -> None:
    """Ranks that go on by themselves are done by the clock: there it counts until nothing is under way."""

    async def work(engine: GroupEngine) -> None:
        endless = asyncio.create_task(engine.generate([8 if together else 7], PARAMS, (0, 0, 0)))
        long = await engine.generate([1] * 90, SamplingParams(max_new_tokens=90), (0, 0, 1))
        late = await engine.generate([1, 1], PARAMS, (0, 0, 2))
        assert (long.token_ids, late.token_ids) == ([1], [1 if together else 0])
        endless.cancel()
        await asyncio.gather(endless, return_exceptions=True)

    sampled(group, work, together=together)


def test_all_requests_are_ended_at_once_with_what_they_have(group: WorkerGroup, together: bool) -> None:
    async def work(engine: GroupEngine) -> None:
        endless = [8 if together else 7]
        calls = [asyncio.create_task(engine.generate(endless, PARAMS, (0, 0, session, 0))) for session in range(4)]
        for _ in range(30):
            await asyncio.sleep(0)
        late = asyncio.create_task(engine.generate(endless, PARAMS, (0, 0, 9, 0)))
        await asyncio.sleep(0)
        await engine.abort_all()
        answers = await asyncio.wait_for(asyncio.gather(*calls, late), 10)
        assert [answer.token_ids for answer in answers] == [[0], [1], [0], [1], []]
        assert answers[-1].finish_reason == "abort"

    sampled(group, work, together=together)


def test_a_follow_up_joins_the_next_step_on_the_same_rank(group: WorkerGroup, together: bool) -> None:
    async def two_turns(engine: GroupEngine, sample: int) -> None:
        await engine.generate([1], PARAMS, (0, 0, 5, sample))
        await engine.generate([1, 1], PARAMS, (0, 0, 5, sample, 1))

    async def work(engine: GroupEngine) -> None:
        await asyncio.gather(*(two_turns(engine, sample) for sample in range(2)))

    calls, others = sampled(group, work, together=together)
    assert calls == [[(0, 0, 5, 0), (0, 0, 5, 1)], [(0, 0, 5, 0, 1)], [(0, 0, 5, 1, 1)], []]
    assert others == ([[]] * 4 if together else [])


def test_a_cancelled_request_leaves_at_once_and_a_refused_one_fails_alone(group: WorkerGroup, together: bool) -> None:
    async def work(engine: GroupEngine) -> None:
        endless = asyncio.create_task(engine.generate([8 if together else 7], PARAMS, (0, 0, 0, 0)))
        refused = asyncio.create_task(engine.generate([9], PARAMS, (0, 0, 1, 0)))
        served = asyncio.create_task(engine.generate([1], PARAMS, (0, 0, 1, 1)))
        with pytest.raises(RolloutError, match="it is refused"):
            await refused
        assert (await served).token_ids == [1]
        await asyncio.sleep(0.05)  # now its rank does nothing but wait
        endless.cancel()
        with pytest.raises(asyncio.CancelledError):
            await endless
        await asyncio.wait_for(engine.drain(), 10)  # its rank would wait for longer

    sampled(group, work, together=together)


def test_experts_that_a_pass_has_chosen_come_back_to_the_samples(group: WorkerGroup) -> None:
    samples = [TrainSample([1, 2, 3], 1, [1]) for _ in range(3)]
    trainer = GroupTrainer(group, {})
    assert trainer.log_probs(samples, reference=True) == ["result"] * 3
    assert all(sample.routed_experts is None for sample in samples)
    trainer.log_probs(samples)
    assert [int(sample.routed_experts[0, 0, 0]) for sample in samples if sample.routed_experts is not None] == [0, 1, 2]
