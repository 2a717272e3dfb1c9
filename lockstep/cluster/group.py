"""`WorkerGroup`: ranks as processes, seen from the controller. An `Executor` has started them, here or elsewhere.

    call("step", samples)  --the same to all-->  ranks work together  -->  [answer of rank 0, of rank 1, ...]

The group is all or nothing: ranks exchange data in every layer, so when one dies the others can only wait. Then all are
ended, and this and every later call raises the same `RankError`.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lockstep.cluster.executor import Executor, LocalProcesses, NodeLost, Process, StartedRank
from lockstep.cluster.wire import Answer, Call, Failure, News, Poke, Start, frame
from lockstep.errors import LockstepError, RankError

_FOLLOW_S = 10.0
"""After one rank has failed, the others get this long to answer too. Those that do not wait for the first."""
_END_S = 5.0
"""What a process gets to end by itself."""
_KEPT_LINES = 20
_QUOTED_LINES = 3


@dataclass
class _Worker:
    """One rank's process. `outcomes` holds answers and failures that nobody has taken yet, by call."""

    rank: int
    started: StartedRank
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT_LINES))
    outcomes: dict[int, Answer | Failure] = field(default_factory=dict)
    heard_at: float = field(default_factory=time.monotonic)
    relay: threading.Thread | None = None


class WorkerGroup:
    """Starts `num_ranks` processes, each of which builds `make(place, *arguments)`.

    The group is made on the main thread: ranks die with it. Calls come from one thread at a time.

    Args:
        executor: starts and ends the processes; by default on this machine.
        timeout_s: how long a rank may work without any sign of life.
        on_news: gets what ranks report during calls: rank, kind, value.
    """

    def __init__(
        self,
        num_ranks: int,
        make: Callable[..., Any],
        arguments: tuple[Any, ...] = (),
        *,
        timeout_s: float,
        on_news: Callable[[int, str, Any], None] = lambda rank, kind, value: None,
        executor: Executor | None = None,
    ) -> None:
        self.timeout_s = timeout_s
        self._on_news = on_news
        self._failed: RankError | None = None
        self._number = 0
        self._under_way: dict[int, tuple[str, set[int]]] = {0: ("start", set(range(num_ranks)))}
        """Calls by number: their method, and the ranks that have not answered."""
        self._waiting: dict[int, asyncio.Future[None]] = {}
        """Who awaits a call's last answer."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._selector = selectors.DefaultSelector()
        started = (executor or LocalProcesses()).start(num_ranks, timeout_s)
        self._workers = [_Worker(rank, process) for rank, process in enumerate(started)]
        for worker in self._workers:
            worker.relay = threading.Thread(target=self._pass_on, args=(worker,), daemon=True)
            worker.relay.start()
            self._selector.register(worker.started.channel, selectors.EVENT_READ, worker)
        for worker in self._workers:
            self._send(worker, frame(Start(make, worker.rank, num_ranks, worker.started.local_rank, arguments)))

    def __len__(self) -> int:
        return len(self._workers)

    @property
    def works(self) -> bool:
        """False once a rank is lost."""
        return self._failed is None

    def wait_for_start(self) -> None:
        """Return when all ranks have built what they serve.

        Raises:
            RankError: one could not, or an error of ours that one has raised.
        """
        self.finish(0)

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """The same call on all ranks together; answers in rank order.

        Raises:
            RankError: a rank died, failed or fell silent.
            LockstepError: the first that a rank raised. All ranks have answered, and the group works on.
        """
        return self.call_each(method, [arguments] * len(self))

    def call_each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """As `call`, with arguments of its own for every rank."""
        return self.finish(self._begin(method, dict(enumerate(arguments))))

    def begin(self, method: str, *arguments: Any) -> int:
        """Start what `call` does; `finish` of the number that this returns does the rest."""
        return self._begin(method, dict.fromkeys(range(len(self)), arguments))

    def finish(self, number: int) -> list[Any]:
        """Answers of all ranks to a call that was begun. Raises what `call` raises."""
        while self._under_way[number][1] and self._failed is None:
            for key, _ in self._selector.select(timeout=min(self.timeout_s, 1.0)):
                self._hear(key.data)
            self._require_signs_of_life(number)
        return self._take(number, list(range(len(self))))

    async def ask(self, method: str, arguments: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """As `call`, on some ranks, while the event loop goes on. Raises what `call` raises."""
        number = self._begin(method, arguments)
        self._attach(asyncio.get_running_loop())
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            while self._under_way[number][1] and self._failed is None:
                await asyncio.wait([future], timeout=min(self.timeout_s, 1.0))
                self._require_signs_of_life(number)
        finally:
            self._waiting.pop(number, None)
        return dict(zip(arguments, self._take(number, list(arguments)), strict=True))

    def poke(self, ranks: Sequence[int]) -> None:
        """Let interruptible calls under way on these ranks come back."""
        for rank in ranks:
            self._send(self._workers[rank], frame(Poke()))

    def close(self) -> None:
        """End all processes: they leave when their channel closes, and are killed if they do not."""
        self._detach()
        self._selector.close()
        for worker in self._workers:
            worker.started.channel.close()
        deadline = time.monotonic() + (_END_S if self._failed is None else 0.0)
        for worker in self._workers:
            _end(worker.started.process, max(0.0, deadline - time.monotonic()))
            if worker.relay is not None:
                worker.relay.join(_END_S)

    # How a call goes

    def _begin(self, method: str, arguments: Mapping[int, tuple[Any, ...]]) -> int:
        if self._failed is not None:
            raise self._failed
        self._number += 1
        number = self._number
        self._under_way[number] = (method, set(arguments))
        frames: dict[int, bytes] = {}
        for rank, values in arguments.items():
            if id(values) not in frames:  # the same arguments for all are pickled once
                frames[id(values)] = frame(Call(number, method, values))
            self._workers[rank].heard_at = time.monotonic()
            self._send(self._workers[rank], frames[id(values)])
        return number

    def _take(self, number: int, ranks: list[int]) -> list[Any]:
        method, _ = self._under_way.pop(number)
        if self._failed is not None:
            raise self._failed
        outcomes = [self._workers[rank].outcomes.pop(number) for rank in ranks]
        failures = [(rank, o) for rank, o in zip(ranks, outcomes, strict=True) if isinstance(o, Failure)]
        if failures:
            rank, failure = min(failures, key=lambda item: isinstance(item[1].error, str))
            raise _error_of(self._workers[rank].started.name, failure, method)
        return [outcome.value for outcome in outcomes if isinstance(outcome, Answer)]

    def _hear(self, worker: _Worker) -> None:
        """Take one message of a rank that has something to say."""
        try:
            message = worker.started.channel.receive()
        except (EOFError, OSError):
            self._lose(worker)
            return
        worker.heard_at = time.monotonic()
        if isinstance(message, News):
            if message.kind is not None:
                self._on_news(worker.rank, message.kind, message.value)
            return
        worker.outcomes[message.number] = message
        missing = self._under_way[message.number][1]
        missing.discard(worker.rank)
        if message.number in self._waiting and not missing and not self._waiting[message.number].done():
            self._waiting[message.number].set_result(None)

    def _require_signs_of_life(self, number: int) -> None:
        """Give up on ranks that are silent for too long, or that wait for one which has failed."""
        if self._failed is not None or not (missing := self._under_way[number][1]):
            return
        method, now = self._under_way[number][0], time.monotonic()
        for worker in self._workers:
            failure = worker.outcomes.get(number)
            if isinstance(failure, Failure) and now - worker.heard_at > _FOLLOW_S:
                name = worker.started.name
                error = _error_of(name, failure, method)
                self._fail(error if isinstance(error, RankError) else _wrapped(name, error, method))
                return
        rank = min(missing, key=lambda rank: self._workers[rank].heard_at)
        silent_s = now - self._workers[rank].heard_at
        if silent_s > self.timeout_s:
            self._fail(
                RankError(
                    self._workers[rank].started.name,
                    f"silent for {silent_s:.0f} s",
                    f"it was told to `{method}` and gave no sign of life since.",
                    "Raise --distributed-timeout-minutes if it only needs longer.",
                )
            )

    def _send(self, worker: _Worker, data: bytes) -> None:
        try:
            worker.started.channel.send_frame(data)
        except OSError:
            self._lose(worker)

    # How it ends badly

    def _lose(self, worker: _Worker) -> None:
        """A rank's end of the channel is closed: it is dead."""
        if self._failed is not None:
            return
        ended, remedy = _fate(worker.started)
        if worker.relay is not None:
            worker.relay.join(1.0)
        doing = next((method for method, ranks in self._under_way.values() if worker.rank in ranks), None)
        said = " | ".join(list(worker.last_lines)[-_QUOTED_LINES:])
        self._fail(
            RankError(
                worker.started.name,
                ended,
                ("it was idle" if doing is None else f"it was told to `{doing}`")
                + (f"; its last words: {said}" if said else "; it said nothing on stderr")
                + ".",
                remedy,
            )
        )

    def _fail(self, error: RankError) -> None:
        self._failed = error
        for worker in self._workers:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(worker.started.channel)
        self._detach()
        for worker in self._workers:
            worker.started.process.kill()
        for future in self._waiting.values():
            if not future.done():
                future.set_result(None)

    # The event loop

    def _attach(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is None and self._failed is None:
            self._loop = loop
            for worker in self._workers:
                loop.add_reader(worker.started.channel.fileno(), self._hear_if_ready, worker)

    def _detach(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            for worker in self._workers:
                self._loop.remove_reader(worker.started.channel.fileno())
        self._loop = None

    def _hear_if_ready(self, worker: _Worker) -> None:
        """A call that ran inside a callback may have taken the message already."""
        if any(key.data is worker for key, _ in self._selector.select(timeout=0)):
            self._hear(worker)

    # What they say

    def _pass_on(self, worker: _Worker) -> None:
        """Show what a rank prints, until the group has failed: then all but the first only complain of the loss."""
        for line in worker.started.process.lines():
            text = line.decode(errors="replace").rstrip()
            if text and self._failed is None:
                worker.last_lines.append(text)
                print(f"[{worker.started.name}] {text}", file=sys.stderr, flush=True)


def _fate(started: StartedRank) -> tuple[str, str]:
    """How a rank has ended whose channel is closed, and what to do about it."""
    remedy = "Start the node again; with --load a run goes on from its last checkpoint."
    try:
        try:
            code = started.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            started.process.kill()
            code = started.process.wait(_END_S)
    except NodeLost as error:
        return "lost with its node", f"{error} {remedy}"
    except subprocess.TimeoutExpired:
        return "cut off", f"Its node does not answer. {remedy}"
    if code == -signal.SIGKILL:
        remedy = "The kernel sends SIGKILL where memory is short: look at dmesg."
    else:
        remedy = "Look at what it printed above."
    return (f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"), remedy


def _end(process: Process, timeout_s: float) -> None:
    """Wait for a process; one that is still there is killed, and may need a moment to be gone."""
    with contextlib.suppress(NodeLost, subprocess.TimeoutExpired):
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(_END_S)


def _error_of(name: str, failure: Failure, method: str) -> LockstepError:
    if isinstance(failure.error, LockstepError):
        return failure.error
    print(failure.trace, file=sys.stderr, flush=True)
    text = str(failure.error)
    remedy = "The traceback is above."
    if "out of memory" in text.lower():
        remedy = "Lower --max-tokens-per-gpu, recompute activations, or divide the model further."
    return RankError(name, text.splitlines()[0], f"that is how its `{method}` failed.", remedy)


def _wrapped(name: str, error: LockstepError, method: str) -> RankError:
    """An error of ours that one rank alone has met, which leaves the others waiting."""
    return RankError(name, str(error), f"it alone failed to `{method}`, and the others wait for it.", "See there.")
