"""A group of ranks as what the loop knows: a training engine and a rollout engine."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

from lockstep.checkpoint.hf import OnBytes
from lockstep.cluster.group import WorkerGroup
from lockstep.cluster.requests import Request
from lockstep.rollout.continuation import joined, remaining
from lockstep.rollout.embedded.engine import settle
from lockstep.rollout.engine import Generation, SamplingParams
from lockstep.trainer.batch import TrainSample
from lockstep.trainer.engine import LogProbs, StepResult


class GroupTrainer:
    """`TrainingEngine` over all ranks of a group, which hold the weights and the optimizer between them.

    Args:
        on_bytes: what is told of an export while it lasts, by what the ranks call it.
    """

    def __init__(self, group: WorkerGroup, listeners: dict[str, OnBytes]) -> None:
        self.group = group
        self.version = 0
        self.is_at_work = False
        self._listeners = listeners

    def log_probs(self, samples: Sequence[TrainSample], *, reference: bool = False) -> list[LogProbs]:
        results: list[LogProbs]
        results, routes = self.group.call("log_probs", list(samples), reference)[0]
        if routes is not None:
            for sample, experts in zip(samples, routes, strict=True):
                sample.routed_experts = experts
        return results

    def step(self, samples: Sequence[TrainSample]) -> StepResult:
        result: StepResult = self.group.call("step", list(samples))[0]
        self.version += 1
        return result

    def finish_update(self) -> None:
        """Ranks do so in each step."""

    def update_reference(self) -> None:
        self.group.call("update_reference")

    def save(self, folder: Path, *, with_optimizer: bool = True) -> None:
        self.group.call("save", folder.resolve(), with_optimizer)

    def load(self, folder: Path, *, with_optimizer: bool = True) -> None:
        self.group.call("load", folder.resolve(), with_optimizer)

    def export(self, folder: Path, *, source: Path, on_bytes: OnBytes | None = None) -> None:
        if on_bytes is not None:
            self._listeners["exporting"] = on_bytes
        try:
            self.group.call("export", folder.resolve(), source.resolve())
        finally:
            self._listeners.pop("exporting", None)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.group.call("state_dict")[0]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.group.call("load_state_dict", state)
        self.version = state["version"]


class GroupEngine:
    """`RolloutEngine` over the embedded engines of all ranks.

    Requests of a session, which is a group of samples or a conversation, go to one rank, where they share their
    prompt's keys and values. A new session goes to the rank with the fewest tokens. Results repeat: the choice and
    every batch depend on the order of (group, sample), never on the clock. So where ranks go on by themselves, whose
    tokens are done first does not count: tokens are forgotten when nothing is under way any more.

    Args:
        together: ranks decode together, as each has some of the experts; else each goes on by itself.
    """

    def __init__(self, group: WorkerGroup, *, together: bool) -> None:
        self.group = group
        ranks = range(len(group))
        self._lanes = [_Lane(group, part, self._settled) for part in ([ranks] if together else [[r] for r in ranks])]
        self._lane_of_rank = {rank: lane for lane in self._lanes for rank in lane.ranks}
        self._rank_of: dict[tuple[int, ...], int] = {}
        self._together = together
        self._tokens = [0] * len(group)
        """By rank: of requests under way."""
        self._arrived: list[tuple[Request, asyncio.Future[Generation]]] = []
        self._dealing: asyncio.Task[None] | None = None
        self._numbers = count()
        self._is_open = False

    async def generate(self, input_ids: Sequence[int], params: SamplingParams, stream: tuple[int, ...]) -> Generation:
        request = Request(next(self._numbers), list(input_ids), params, stream)
        future: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        self._arrived.append((request, future))
        if self._dealing is None or self._dealing.done():
            self._dealing = asyncio.create_task(self._deal())
        try:
            return await future
        except asyncio.CancelledError:
            if (rank := self._rank_of.get(_session_of(stream))) is not None:
                self._lane_of_rank[rank].abort(rank, request.number)
            raise

    async def abort_all(self) -> None:
        arrived, self._arrived = self._arrived, []
        for _, future in arrived:
            if not future.done():
                future.set_result(Generation([], [], "abort", []))
        for lane in self._lanes:
            lane.abort_all()

    async def drain(self) -> None:
        if self._dealing is not None:
            await asyncio.wait([self._dealing])
        for lane in self._lanes:
            await lane.drain()
        if self._is_open and self.group.works:
            self.group.call("end_sampling")
        self._is_open = False

    def set_version(self, version: int) -> None:
        self._rank_of.clear()
        self._tokens = [0] * len(self.group)
        self.group.call("begin_sampling", version)
        self._is_open = True

    def close(self) -> None:
        """The group is closed by who started it."""

    async def _settled(self) -> None:
        """Return when generate functions had their turns, and what they asked for is dealt."""
        await settle()
        if self._dealing is not None:
            await asyncio.wait([self._dealing])

    async def _deal(self) -> None:
        """Give every session that is new to the rank with the fewest tokens."""
        await settle()
        arrived, self._arrived = self._arrived, []
        arrived = [(request, future) for request, future in arrived if not future.done()]
        if not any(lane.is_busy for lane in self._lanes):
            self._tokens = [0] * len(self.group)
        sizes: Counter[tuple[int, ...]] = Counter()
        for request, _ in arrived:
            sizes[_session_of(request.stream)] += _num_tokens(request)
        for session, size in sorted(sizes.items()):
            if session not in self._rank_of:
                self._rank_of[session] = self._tokens.index(min(self._tokens))
            self._tokens[self._rank_of[session]] += size
        for request, future in arrived:
            rank = self._rank_of[_session_of(request.stream)]
            if self._together:
                future.add_done_callback(partial(self._forget, rank, _num_tokens(request)))
            self._lane_of_rank[rank].add(rank, request, future)

    def _forget(self, rank: int, num_tokens: int, _: asyncio.Future[Generation]) -> None:
        self._tokens[rank] = max(0, self._tokens[rank] - num_tokens)


class _Interrupted(Generation):
    """What a request had when new weights came. Nobody outside sees it: the request goes on."""


class ReplicaEngine(GroupEngine):
    """`RolloutEngine` over processes with copies of the weights, on devices of their own.

    New weights may come while requests are under way. Those go on under them: their tokens so far stay, with version,
    log-prob and experts, and are read again by the new weights.

    Args:
        send: lets the trainer send its weights, while the replicas receive them.
    """

    def __init__(self, group: WorkerGroup, send: Callable[[], None]) -> None:
        super().__init__(group, together=False)
        self._send = send
        self._version: int | None = None

    async def generate(self, input_ids: Sequence[int], params: SamplingParams, stream: tuple[int, ...]) -> Generation:
        part = await super().generate(input_ids, params, stream)
        written = part
        while isinstance(part, _Interrupted):
            part = await super().generate(*remaining(input_ids, params, written), stream)
            written = joined(written, part)
        return written

    def set_version(self, version: int) -> None:
        if version == self._version and any(lane.is_busy for lane in self._lanes):
            return
        if version != self._version:
            self.group.poke(range(len(self.group)))
            number = self.group.begin("receive_weights")
            self._send()
            for lane, ended in zip(self._lanes, self.group.finish(number), strict=True):
                for request, generation in ended:
                    lane.answer(request, _Interrupted(**vars(generation)))
            self._version = version
        super().set_version(version)


def _session_of(stream: tuple[int, ...]) -> tuple[int, ...]:
    """Streams are (purpose, rollout or data set, group, sample, branch): what samples of one prompt share."""
    return stream[:3]


def _num_tokens(request: Request) -> int:
    return len(request.input_ids) + request.params.max_new_tokens


class _Lane:
    """Ranks whose engines go on together, their requests, and the task that keeps them going.

    Whenever requests finish, the ranks wait until generate functions had their turns to react, so that a follow-up
    request joins the next step whatever the clock does.
    """

    def __init__(self, group: WorkerGroup, ranks: Sequence[int], settled: Callable[[], Awaitable[None]]) -> None:
        self.group = group
        self.ranks = ranks
        self._settled = settled
        self._news: dict[int, tuple[list[Request], list[int]]] = {}
        """By rank: requests that it has not got yet, and numbers of those to let go."""
        self._futures: dict[int, asyncio.Future[Generation]] = {}
        """Of requests that a rank has, or is about to get."""
        self._rank_of: dict[int, int] = {}
        self._driver: asyncio.Task[None] | None = None
        self._can_poke = False

    def add(self, rank: int, request: Request, future: asyncio.Future[Generation]) -> None:
        self._futures[request.number] = future
        self._rank_of[request.number] = rank
        self._for(rank)[0].append(request)
        self._wake()

    @property
    def is_busy(self) -> bool:
        return bool(self._futures)

    def abort(self, rank: int, number: int) -> None:
        if number in self._futures:
            self._for(rank)[1].append(number)
            self._wake()

    def abort_all(self) -> None:
        for number in self._futures:
            self.abort(self._rank_of[number], number)

    async def drain(self) -> None:
        while self._driver is not None and not self._driver.done():
            await asyncio.wait([self._driver])

    def _for(self, rank: int) -> tuple[list[Request], list[int]]:
        return self._news.setdefault(rank, ([], []))

    def _wake(self) -> None:
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive())
        elif self._can_poke:
            self._can_poke = False
            self.group.poke(self.ranks)

    async def _drive(self) -> None:
        try:
            while self._futures:
                arguments = {rank: self._for(rank) for rank in self.ranks}
                self._news = {}
                self._can_poke = True
                ended = await self.group.ask("advance", arguments)
                self._can_poke = False
                for number, outcome in chain(*ended.values()):
                    self.answer(number, outcome)
                if any(ended.values()):
                    await self._settled()
        except Exception as error:
            self._news = {}
            for number in list(self._futures):
                self.answer(number, error)

    def answer(self, number: int, outcome: Generation | Exception) -> None:
        future = self._futures.pop(number)
        del self._rank_of[number]
        if future.done():
            return
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
