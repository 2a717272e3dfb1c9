"""`WorkerGroup`: ranks as processes of this machine, seen from the controller.

    call("step", samples)  --the same to all-->  ranks work together  -->  [answer of rank 0, of rank 1, ...]

The group is all or nothing: ranks exchange data in every layer, so when one dies the others can only wait. Then all are
ended, and this and every later call raises the same `RankError`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from lockstep.cluster.wire import Answer, Call, Channel, Failure, News, Poke, Start, frame
from lockstep.errors import LockstepError, RankError

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from lockstep.cluster.worker import main; main(*map(int, sys.argv[2:]))"
)
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
    process: subprocess.Popen[bytes]
    channel: Channel
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT_LINES))
    outcomes: dict[int, Answer | Failure] = field(default_factory=dict)
    heard_at: float = field(default_factory=time.monotonic)
    relay: threading.Thread | None = None


class WorkerGroup:
    """Starts `num_ranks` processes, each of which builds `make(place, *arguments)`.

    Everything happens on the thread that made the group, which has to be the main one: ranks die with it.

    Args:
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
        self._workers: list[_Worker] = []
        for rank in range(num_ranks):
            self._workers.append(self._start(rank))
            self._selector.register(self._workers[-1].channel, selectors.EVENT_READ, self._workers[-1])
        for worker in self._workers:
            self._send(worker, frame(Start(make, worker.rank, num_ranks, arguments)))

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
        self._finish(0)

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """The same call on all ranks together; answers in rank order.

        Raises:
            RankError: a rank died, failed or fell silent.
            LockstepError: the first that a rank raised. All ranks have answered, and the group works on.
        """
        return self.call_each(method, [arguments] * len(self))

    def call_each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """As `call`, with arguments of its own for every rank."""
        return self._finish(self._begin(method, dict(enumerate(arguments))))

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
            worker.channel.close()
        deadline = time.monotonic() + (_END_S if self._failed is None else 0.0)
        for worker in self._workers:
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
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

    def _finish(self, number: int) -> list[Any]:
        ranks = sorted(self._under_way[number][1])
        while self._under_way[number][1] and self._failed is None:
            for key, _ in self._selector.select(timeout=min(self.timeout_s, 1.0)):
                self._hear(key.data)
            self._require_signs_of_life(number)
        return self._take(number, ranks)

    def _take(self, number: int, ranks: list[int]) -> list[Any]:
        method, _ = self._under_way.pop(number)
        if self._failed is not None:
            raise self._failed
        outcomes = [self._workers[rank].outcomes.pop(number) for rank in ranks]
        failures = [(rank, o) for rank, o in zip(ranks, outcomes, strict=True) if isinstance(o, Failure)]
        if failures:
            raise _error_of(*min(failures, key=lambda item: isinstance(item[1].error, str)), method)
        return [outcome.value for outcome in outcomes if isinstance(outcome, Answer)]

    def _hear(self, worker: _Worker) -> None:
        """Take one message of a rank that has something to say."""
        try:
            message = worker.channel.receive()
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
                error = _error_of(worker.rank, failure, method)
                self._fail(error if isinstance(error, RankError) else _wrapped(worker.rank, error, method))
                return
        rank = min(missing, key=lambda rank: self._workers[rank].heard_at)
        silent_s = now - self._workers[rank].heard_at
        if silent_s > self.timeout_s:
            self._fail(
                RankError(
                    f"rank {rank}",
                    f"silent for {silent_s:.0f} s",
                    f"it was told to `{method}` and gave no sign of life since.",
                    "Raise --distributed-timeout-minutes if it only needs longer.",
                )
            )

    def _send(self, worker: _Worker, data: bytes) -> None:
        try:
            worker.channel.send_frame(data)
        except OSError:
            self._lose(worker)

    # How it ends badly

    def _lose(self, worker: _Worker) -> None:
        """A rank's end of the channel is closed: it is dead."""
        if self._failed is not None:
            return
        try:
            code = worker.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            code = worker.process.wait()
        if worker.relay is not None:
            worker.relay.join(1.0)
        doing = next((method for method, ranks in self._under_way.values() if worker.rank in ranks), None)
        said = " | ".join(list(worker.last_lines)[-_QUOTED_LINES:])
        self._fail(
            RankError(
                f"rank {worker.rank}",
                f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}",
                ("it was idle" if doing is None else f"it was told to `{doing}`")
                + (f"; its last words: {said}" if said else "; it said nothing on stderr")
                + ".",
                "The kernel sends SIGKILL where memory is short: look at dmesg."
                if code == -signal.SIGKILL
                else "Look at what it printed above.",
            )
        )

    def _fail(self, error: RankError) -> None:
        self._failed = error
        for worker in self._workers:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(worker.channel)
        self._detach()
        for worker in self._workers:
            worker.process.kill()
        for future in self._waiting.values():
            if not future.done():
                future.set_result(None)

    # The event loop

    def _attach(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is None and self._failed is None:
            self._loop = loop
            for worker in self._workers:
                loop.add_reader(worker.channel.fileno(), self._hear_if_ready, worker)

    def _detach(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            for worker in self._workers:
                self._loop.remove_reader(worker.channel.fileno())
        self._loop = None

    def _hear_if_ready(self, worker: _Worker) -> None:
        """A call that ran inside a callback may have taken the message already."""
        if any(key.data is worker for key, _ in self._selector.select(timeout=0)):
            self._hear(worker)

    # Processes

    def _start(self, rank: int) -> _Worker:
        ours, theirs = socket.socketpair()
        ours.settimeout(self.timeout_s)
        # -P: what the caller's folder holds is no module. Out of order lines are worse than slow ones: -u.
        process = subprocess.Popen(
            [sys.executable, "-u", "-P", "-c", _BOOT, json.dumps(sys.path), str(theirs.fileno()), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(theirs.fileno(),),
        )
        theirs.close()
        worker = _Worker(rank, process, Channel(ours))
        assert process.stdout is not None
        worker.relay = threading.Thread(target=self._pass_on, args=(worker, process.stdout), daemon=True)
        worker.relay.start()
        return worker

    def _pass_on(self, worker: _Worker, output: IO[bytes]) -> None:
        """Show what a rank prints, until the group has failed: then all but the first only complain of the loss."""
        with output:
            for line in output:
                text = line.decode(errors="replace").rstrip()
                if text and self._failed is None:
                    worker.last_lines.append(text)
                    print(f"[rank {worker.rank}] {text}", file=sys.stderr, flush=True)


def _error_of(rank: int, failure: Failure, method: str) -> LockstepError:
    if isinstance(failure.error, LockstepError):
        return failure.error
    print(failure.trace, file=sys.stderr, flush=True)
    text = str(failure.error)
    remedy = "The traceback is above."
    if "out of memory" in text.lower():
        remedy = "Lower --max-tokens-per-gpu, recompute activations, or divide the model further."
    return RankError(f"rank {rank}", text.splitlines()[0], f"that is how its `{method}` failed.", remedy)


def _wrapped(rank: int, error: LockstepError, method: str) -> RankError:
    """An error of ours that one rank alone has met, which leaves the others waiting."""
    return RankError(
        f"rank {rank}", str(error), f"it alone failed to `{method}`, and the others wait for it.", "See there."
    )
