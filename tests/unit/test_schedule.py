"""The order in which rollouts begin, and what a checkpoint says of those under way, whatever the clock does."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from lockstep.run import FinishedRollout
from lockstep.schedule import Rollouts


class Stage:
    """Stands for a run: rollouts draw a prompt when they begin, and end when the test says so."""

    def __init__(self, num_rollout: int = 6) -> None:
        self.events: list[str] = []
        self.drawn = 0
        self.version = 0
        self.gates = [asyncio.Event() for _ in range(num_rollout)]
        data_source = SimpleNamespace(state_dict=lambda: {"drawn": self.drawn})
        self.run: Any = SimpleNamespace(
            ahead={}, next_rollout_id=0, num_rollout=num_rollout, engine=None, data_source=data_source
        )
        self.run.trainer = SimpleNamespace(is_at_work=False)
        self.run.state = lambda: {"version": self.version, "data_source": data_source.state_dict()}

    def rollouts(self, max_staleness: int, *, overlap: bool) -> Rollouts:
        return Rollouts(self.run, self.sample, self.give, max_staleness=max_staleness, overlap=overlap, now=lambda: 0.0)

    def give(self) -> dict[str, float]:
        self.events.append(f"weights {self.version}")
        return {}

    async def sample(self, rollout_id: int) -> FinishedRollout:
        self.drawn += 1
        self.events.append(f"begin {rollout_id}")
        await self.gates[rollout_id].wait()
        self.events.append(f"end {rollout_id}")
        return FinishedRollout([], {})

    def train(self, rollout_id: int) -> None:
        self.events.append(f"train {rollout_id}")
        self.version += 1
        self.run.next_rollout_id = rollout_id + 1

    def finish(self, *rollout_ids: int) -> None:
        for rollout_id in rollout_ids:
            self.gates[rollout_id].set()


async def loop(stage: Stage, rollouts: Rollouts) -> None:
    async with rollouts:
        for rollout_id in range(3):
            await rollouts.take(rollout_id)
            await rollouts.beside(stage.train, rollout_id)


def played(max_staleness: int, *, overlap: bool) -> list[str]:
    async def play() -> list[str]:
        stage = Stage(num_rollout=3)
        stage.finish(0, 1, 2)
        await loop(stage, stage.rollouts(max_staleness, overlap=overlap))
        return [event for event in stage.events if not event.startswith("end")]

    return asyncio.run(play())


def test_without_staleness_stages_follow_each_other() -> None:
    assert played(0, overlap=False) == [
        *("weights 0", "begin 0", "train 0"),
        *("weights 1", "begin 1", "train 1"),
        *("weights 2", "begin 2", "train 2"),
    ]


def test_one_step_off_a_rollout_begins_with_the_weights_before_training() -> None:
    assert played(1, overlap=False) == [
        *("weights 0", "begin 0", "weights 0", "begin 1", "train 0"),
        *("weights 1", "begin 2", "train 1"),
        "train 2",
    ]


def test_overlapping_rollouts_begin_as_far_ahead_as_the_bound_allows() -> None:
    async def play() -> tuple[list[str], list[str]]:
        stage = Stage()
        stage.finish(0, 1)
        async with stage.rollouts(2, overlap=True) as rollouts:
            await rollouts.take(0)
            stage.train(0)
            first = len(stage.events)
            await rollouts.take(1)
            return stage.events[:first], stage.events[first:]

    first, second = asyncio.run(play())
    assert [event for event in first if not event.startswith("end")] == [
        "weights 0",
        "begin 0",
        "begin 1",
        "begin 2",
        "train 0",
    ]
    assert [event for event in second if not event.startswith("end")] == ["weights 1", "begin 3"]


@pytest.mark.parametrize(
    ("finished", "ahead", "drawn"), [((), [], 1), ((1,), [1], 2), ((2,), [], 1), ((1, 2), [1, 2], 3)]
)
def test_a_checkpoint_holds_what_is_finished_and_draws_the_rest_again(
    finished: tuple[int, ...], ahead: list[int], drawn: int
) -> None:
    """Rollouts 1 and 2 are under way when rollout 0 is trained; each has drawn one prompt."""

    async def play() -> dict[str, Any]:
        stage = Stage()
        rollouts = stage.rollouts(2, overlap=True)
        stage.finish(0)
        async with rollouts:
            await rollouts.take(0)
            stage.train(0)
            stage.finish(*finished)
            await asyncio.sleep(0.01)
            return rollouts.state()

    state = asyncio.run(play())
    assert state["ahead"] == ahead
    assert state["data_source"] == {"drawn": drawn}


def test_a_failed_rollout_ends_the_run_when_its_turn_comes() -> None:
    async def fail(rollout_id: int) -> FinishedRollout:
        if rollout_id:
            raise ValueError("no rewards")
        return FinishedRollout([], {})

    async def play() -> None:
        stage = Stage()
        async with Rollouts(stage.run, fail, stage.give, max_staleness=1, overlap=False, now=lambda: 0.0) as rollouts:
            await rollouts.take(0)
            await rollouts.settle()
            stage.train(0)
            assert rollouts.state()["ahead"] == []
            with pytest.raises(ValueError, match="no rewards"):
                await rollouts.take(1)

    asyncio.run(play())
