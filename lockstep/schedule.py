"""When rollouts are sampled: before they are trained on, by so many rollouts as `--max-staleness` allows.

staleness 0      sample 0, train 0, sample 1, train 1, ...
1, one after another    sample 0, then sample 1 beside train 0, sample 2 beside train 1, ...
n, overlapping   sample up to n rollouts ahead at the same time; new weights reach them in the middle
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from lockstep.run import FinishedRollout, Run, data_state

T = TypeVar("T")


class Rollouts:
    """The rollouts of a run, in order.

    Rollout r begins when rollouts 0 to r - 1 - `max_staleness` are trained, so no token of it is older by more.

    Args:
        sample: samples one rollout under the weights that the engine has.
        give_newest_weights: brings the trainer's weights to the engine; returns metrics.
        now: seconds since the run began.
        overlap: begin a rollout before the one before it is finished, and give the engine new weights while it samples.
    """

    def __init__(
        self,
        run: Run,
        sample: Callable[[int], Awaitable[FinishedRollout]],
        give_newest_weights: Callable[[], dict[str, float]],
        *,
        max_staleness: int,
        overlap: bool,
        now: Callable[[], float],
    ) -> None:
        self.run = run
        self._sample = sample
        self._give_newest_weights = give_newest_weights
        self.max_staleness = max_staleness
        self.overlap = overlap
        self._tasks: dict[int, asyncio.Task[FinishedRollout]] = {}
        """Rollouts that were begun and not yet taken."""
        self._before: dict[int, dict[str, Any]] = {}
        """What a run that begins with this rollout has to know, by rollout."""
        self._now = now

    async def __aenter__(self) -> Rollouts:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        if self.overlap and self.run.engine is not None:
            await self.run.engine.drain()

    async def take(self, rollout_id: int) -> FinishedRollout:
        """The next rollout, all before which are trained. Others are under way when this returns, or are begun."""
        for trained in [earlier for earlier in self.run.ahead if earlier < rollout_id]:
            del self.run.ahead[trained]
        if self.overlap:
            updated = self._give_newest_weights()
            for later in range(rollout_id, rollout_id + self.max_staleness + 1):
                await self._begin(later)
            return (await self._finished(rollout_id)).with_metrics(updated)
        await self._begin(rollout_id)
        finished = await self._finished(rollout_id)
        if self.max_staleness:
            await self._begin(rollout_id + 1)
        return finished

    async def beside(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do what takes its time, while rollouts that are under way go on."""
        if not self.max_staleness:
            return work(*arguments)
        self.run.trainer.is_at_work = True
        try:
            return await asyncio.to_thread(work, *arguments)
        finally:
            self.run.trainer.is_at_work = False

    async def settle(self) -> None:
        """Rollouts that sample one after another finish what is under way: evaluation and checkpoints come between."""
        if not self.overlap and self._tasks:
            await asyncio.wait(self._tasks.values())

    def state(self) -> dict[str, Any]:
        """`Run.state`, with finished rollouts that wait for training. Unfinished ones will be sampled again."""
        first, ahead = self.run.next_rollout_id, []
        while first in self.run.ahead:
            ahead.append(first)
            first += 1
        return self.run.state() | {"ahead": ahead} | self._before.get(first, {})

    async def _begin(self, rollout_id: int) -> None:
        """Let it draw its first prompts, if it is not there and nobody did."""
        known = rollout_id in self._tasks or rollout_id in self.run.ahead
        if known or rollout_id >= self.run.num_rollout:
            return
        updated = {} if self.overlap else self._give_newest_weights()
        self._before[rollout_id] = data_state(self.run) if self.max_staleness else {}
        self._tasks[rollout_id] = asyncio.create_task(self._run(rollout_id, updated))
        await asyncio.sleep(0)  # training may begin on another thread now: what has to come before it has come

    async def _run(self, rollout_id: int, updated: dict[str, float]) -> FinishedRollout:
        started = self._now()
        finished = await self._sample(rollout_id)
        times = {"perf/rollout_started_at": started, "perf/rollout_ended_at": self._now()}
        self.run.ahead[rollout_id] = finished.with_metrics(updated | times)
        return self.run.ahead[rollout_id]

    async def _finished(self, rollout_id: int) -> FinishedRollout:
        if rollout_id in self._tasks:
            await self._tasks[rollout_id]
            del self._tasks[rollout_id]
        self._before.pop(rollout_id, None)
        return self.run.ahead[rollout_id]
