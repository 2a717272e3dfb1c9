"""Rewards in worker processes: every call ends by its deadline, with a named outcome.

    score(sample) --Call--> worker: started, judged --> outcome --> failure policy --> sample.reward

A worker that does not answer is killed, and the calls that shared it are sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import TracebackType
from typing import IO, Any, Literal, Self

from lockstep.errors import LockstepError, RewardError
from lockstep.rewards.deepscaler import after_thinking
from lockstep.rewards.outcome import FAILURES, Outcome, Reward, RewardOutcome
from lockstep.rewards.registry import RewardName, check_reward_options, reward_name
from lockstep.rewards.wire import (
    Call,
    Cancel,
    Failed,
    Judged,
    Marker,
    Options,
    Refused,
    Started,
    Verdict,
    frame,
    take_messages,
)
from lockstep.types import Sample

FailurePolicy = Literal["stop", "zero", "drop"]

logger = logging.getLogger(__name__)

_GRACE_S = 0.5
"""What a worker gets to answer a cancellation before it is killed."""
_START_LIMIT_S = 120.0
"""What a worker gets to start and to import a custom reward, which does not count against the reward's deadline."""
_MOST_STRIKES = 2
"""Times that a call may be on a worker which fails for an unknown reason before the call is held responsible."""

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from lockstep.rewards.worker import main; main(*map(int, sys.argv[2:]))"
)
_LIGHT_FIELDS = {"index", "prompt", "response", "label", "metadata"}
"""What built-in rewards read."""
_HEAVY_FIELDS = {"rollout_routed_experts", "rollout_top_p_token_ids", "rollout_top_p_token_offsets"}
"""What custom rewards do not get: megabytes per sample, of use to the trainer only."""


class RewardPool:
    """Worker processes that score samples; an async context manager, tied to the event loop that enters it.

    Workers start when they are needed. Use it from a thread that outlives it: on Linux workers die with the thread
    that started them.

    Args:
        args: the flat options, handed to every reward; must be picklable.
        num_workers: processes at most.
        timeout_s: seconds from the start of a reward function to its kill.
        failure_policy: what a failed call becomes: "stop" raises RewardError, "zero" is reward 0.0 (as the dict
            {reward_key: 0.0} where there is a reward key), "drop" is reward None, for the loop to leave the sample out.
        num_concurrent: async rewards under way at once in one worker. Plain functions run one at a time.
    Raises:
        OptionError: the options name no reward that can work. Also raised by the scoring methods, whatever the
            policy, for a sample that names such a reward and for a custom reward that cannot be imported.
    """

    def __init__(
        self,
        args: Any,
        *,
        num_workers: int = 2,
        timeout_s: float = 30.0,
        failure_policy: FailurePolicy = "drop",
        num_concurrent: int = 64,
    ) -> None:
        check_reward_options(args)
        self._args = args
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._failure_policy = failure_policy
        self._num_concurrent = num_concurrent
        self._options = frame(Options(pickle.dumps(args)))
        self._ids = itertools.count(1)
        self._waiting: dict[RewardName, deque[_PendingCall]] = {}
        self._is_async: dict[RewardName, bool] = {}
        self._workers: set[_Worker] = set()
        self._counts: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
        self._seen: Counter[Outcome] = Counter()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for call in itertools.chain(*self._waiting.values(), *(worker.calls.values() for worker in self._workers)):
            call.future.cancel()
        self._waiting.clear()
        for worker in list(self._workers):
            worker.kill()
        while self._workers:
            await asyncio.sleep(0.001)

    async def score(self, sample: Sample, *, evaluation: bool = False) -> RewardOutcome:
        """Score one sample: sets `sample.reward` and the fields that the reward has changed.

        Cancelling it cancels the reward.
        """
        name = reward_name(self._args, sample)
        if name.builtin == "deepscaler" and after_thinking(sample.response) is None:
            self._counts[evaluation]["no_thinking_end"] += 1
        (outcome,) = await self._score(name, [sample], is_group=False, evaluation=evaluation)
        return outcome

    async def score_group(self, samples: list[Sample], *, evaluation: bool = False) -> list[RewardOutcome]:
        """Score the samples of one prompt: in one call with --group-rm, each on its own without."""
        if self._args.group_rm:
            name = RewardName("--custom-rm-path", self._args.custom_rm_path)
            return await self._score(name, samples, is_group=True, evaluation=evaluation)
        tasks = [asyncio.ensure_future(self.score(sample, evaluation=evaluation)) for sample in samples]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def take_counts(self, *, evaluation: bool = False) -> dict[str, int]:
        """Samples by outcome since the last time; `no_thinking_end` are those that deepscaler gives 0 for that."""
        counts = dict.fromkeys([*map(str, Outcome), "no_thinking_end"], 0) | self._counts[evaluation]
        self._counts[evaluation].clear()
        return counts

    async def _score(
        self, name: RewardName, samples: list[Sample], *, is_group: bool, evaluation: bool
    ) -> list[RewardOutcome]:
        reward_key = (evaluation and self._args.eval_reward_key) or self._args.reward_key
        verdicts, duration_s = await self._judge(name, samples, reward_key, is_group=is_group)
        outcomes = []
        for sample, verdict in zip(samples, verdicts, strict=True):
            self._counts[evaluation][verdict.outcome] += 1
            for field_name, value in (verdict.changes or {}).items():
                setattr(sample, field_name, value)
            sample.reward = verdict.reward if verdict.outcome is Outcome.OK else self._after_failure(reward_key)
            outcomes.append(RewardOutcome(verdict.outcome, sample.reward, verdict.detail, duration_s))
            if verdict.outcome is not Outcome.OK and self._failure_policy == "stop":
                raise _stopping_error(name, sample, verdict)
            self._tell_of_failures(verdict, sample)
        return outcomes

    @property
    def has_scored(self) -> bool:
        """Whether any reward has worked so far."""
        return self._seen[Outcome.OK] > 0

    def _tell_of_failures(self, verdict: Verdict, sample: Sample) -> None:
        """Warn of the first of each kind, and of every doubling from 8: where all rewards hang, a rollout takes very
        long."""
        self._seen[verdict.outcome] += 1
        count = self._seen[verdict.outcome]
        if verdict.outcome not in FAILURES:
            return
        if count == 1:
            reason = verdict.detail.partition("\n")[0]
            logger.warning("The reward of sample %s failed (%s): %s", sample.index, verdict.outcome, reason)
        elif count >= 8 and count & (count - 1) == 0:
            logger.warning(
                "%d rewards have failed so far (%s), and %d worked", count, verdict.outcome, self._seen[Outcome.OK]
            )

    def _after_failure(self, reward_key: str | None) -> Reward | None:
        if self._failure_policy != "zero":
            return None
        return {reward_key: 0.0} if reward_key else 0.0

    async def _judge(
        self, name: RewardName, samples: list[Sample], reward_key: str | None, *, is_group: bool
    ) -> tuple[list[Verdict], float]:
        """One call's verdicts, one per sample, and the seconds it took."""
        try:
            payload = pickle.dumps([_sent_fields(sample, name) for sample in samples])
        except Exception as error:
            detail = f"{error!r}\nThe sample cannot be sent to a worker process; keep plain values in its metadata."
            return [Verdict(Outcome.EXCEPTION, detail=detail)] * len(samples), 0.0
        message = Call(next(self._ids), name, reward_key, payload, is_group)
        call = _PendingCall(message, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(name, deque()).append(call)
        self._dispatch()
        try:
            reply = await call.future
        except asyncio.CancelledError:
            self._abandon(call)
            raise
        duration_s = max(0.0, time.monotonic() - call.started_at)
        return _verdicts(reply, len(samples)), duration_s

    def _abandon(self, call: _PendingCall) -> None:
        """Nobody waits for the call any more."""
        with contextlib.suppress(KeyError, ValueError):
            self._waiting[call.message.reward].remove(call)
        for worker in self._workers:
            if call.message.id in worker.calls:
                self._cancel(call, worker)

    def _dispatch(self) -> None:
        """Hand waiting calls to workers, first come first served per reward, and start workers for the rest."""
        for name, waiting in self._waiting.items():
            while waiting and (worker := self._worker_with_room(name)):
                call = waiting.popleft()
                worker.calls[call.message.id] = call
                worker.send(call.message)
                self._set_deadline(call, worker, _START_LIMIT_S)
            if waiting and not self._workers:
                self._give_up(waiting)

    def _worker_with_room(self, name: RewardName) -> _Worker | None:
        """The least busy worker that can take a call, a fresh one before a busy one."""
        is_async = self._is_async.get(name, False)
        limit = self._num_concurrent if is_async else 1
        living = sorted((worker for worker in self._workers if not worker.is_killed), key=lambda w: len(w.calls))
        if (not living or living[0].calls) and len(self._workers) < self._num_workers:
            with contextlib.suppress(OSError):  # no memory or process to be had: the others have to do
                worker = _Worker(self, self._options)
                self._workers.add(worker)
                return worker
        return next((w for w in living if w.num_calls(is_async, self._is_async) < limit), None)

    def _give_up(self, waiting: deque[_PendingCall]) -> None:
        error = RewardError(
            "--reward-num-workers",
            self._num_workers,
            "the system starts no process for rewards, not even one.",
            "Free memory, or raise the limit on processes (ulimit -u) or open files (ulimit -n).",
        )
        for call in waiting:
            call.fail(error)
        waiting.clear()

    def received(self, worker: _Worker, message: Started | Judged | Failed | Refused) -> None:
        """A worker has answered."""
        call = worker.calls.get(message.id)
        if call is None:
            return
        if isinstance(message, Started):
            self._is_async[call.message.reward] = message.is_async
            call.started_at = time.monotonic()
            if not call.is_cancelled:
                self._set_deadline(call, worker, self._timeout_s)
        else:
            del worker.calls[message.id]
            if isinstance(message, Refused):
                call.fail(message.error)
            else:
                call.finish(message)
        self._dispatch()

    def _set_deadline(self, call: _PendingCall, worker: _Worker, limit_s: float) -> None:
        call.deadline = time.monotonic() + limit_s
        call.set_timer(limit_s, self._cancel, call, worker)

    def _cancel(self, call: _PendingCall, worker: _Worker) -> None:
        """Ask the worker to end the call; kill it when it does not answer."""
        if not call.is_cancelled:
            call.is_cancelled = True
            worker.send(Cancel(call.message.id))
            call.set_timer(_GRACE_S, worker.kill)

    def died(self, worker: _Worker) -> None:
        """A worker is gone, killed by us or by itself: end the calls that are to blame, send the others again."""
        self._workers.discard(worker)
        blamed = _blamed(worker)
        for call in worker.calls.values():
            if call in blamed or call.strikes >= _MOST_STRIKES:
                call.finish(self._failure(call, worker))
            elif not call.future.done():
                call.reset()
                self._waiting.setdefault(call.message.reward, deque()).appendleft(call)
        worker.calls.clear()
        self._dispatch()

    def _failure(self, call: _PendingCall, worker: _Worker) -> Failed:
        if not worker.is_killed:
            return Failed(call.message.id, Outcome.CRASH, f"its worker process died with {worker.exit_status}")
        limit_s = _START_LIMIT_S if call.started_at == math.inf else self._timeout_s
        return Failed(call.message.id, Outcome.TIMEOUT, f"no answer within {limit_s:g} s, so its worker was killed")


@dataclass(eq=False)
class _PendingCall:
    """A call from its submission to its outcome, through as many workers as it needs."""

    message: Call
    future: asyncio.Future[Judged | Failed]
    started_at: float = math.inf
    deadline: float = math.inf
    is_cancelled: bool = False
    strikes: int = 0
    _timer: asyncio.TimerHandle | None = None

    def set_timer(self, delay_s: float, function: Callable[..., object], *arguments: object) -> None:
        self._stop_timer()
        self._timer = asyncio.get_running_loop().call_later(delay_s, function, *arguments)

    def reset(self) -> None:
        """Make it ready for another worker."""
        self._stop_timer()
        self.started_at, self.deadline, self.is_cancelled = math.inf, math.inf, False

    def finish(self, message: Judged | Failed) -> None:
        self._stop_timer()
        if not self.future.done():
            self.future.set_result(message)

    def fail(self, error: LockstepError) -> None:
        """End it with an error that no failure policy covers."""
        self._stop_timer()
        if not self.future.done():
            self.future.set_exception(error)

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()


class _Worker(asyncio.Protocol):
    """The pool's end of one worker process."""

    def __init__(self, pool: RewardPool, options: bytes) -> None:
        self.calls: dict[int, _PendingCall] = {}
        self.holder = 0
        """After its death: the call that had the thread."""
        self.is_killed = False
        self._pool = pool
        self._received = bytearray()
        self._unsent = [options]
        self._transport: asyncio.Transport | None = None
        ours, theirs = socket.socketpair()
        try:
            with theirs, _shared_memory_file() as shared:
                shared.truncate(Marker.SIZE_BYTES)
                self._process = _start_process(theirs.fileno(), shared.fileno())
                self._marker = Marker(shared.fileno())
        except OSError:
            ours.close()
            raise
        self._connecting = asyncio.ensure_future(asyncio.get_running_loop().create_connection(lambda: self, sock=ours))

    @property
    def exit_status(self) -> str:
        code = self._process.returncode
        return f"exit code {code}" if code >= 0 else signal.Signals(-code).name

    def num_calls(self, is_async: bool, kinds: dict[RewardName, bool]) -> int:
        """Calls of this kind that it has."""
        return sum(kinds.get(call.message.reward, False) == is_async for call in self.calls.values())

    def send(self, message: Call | Cancel) -> None:
        if self._transport:
            self._transport.write(frame(message))
        else:
            self._unsent.append(frame(message))

    def kill(self) -> None:
        """End the process and what it started; the pool hears of it by `died`."""
        self.is_killed = True
        self._kill_process_group()
        if self._transport:
            self._transport.abort()  # without waiting for an end of file, which a grandchild may hold up

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.writelines(self._unsent)
        if self.is_killed:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        self._received += data
        for message in take_messages(self._received):
            self._pool.received(self, message)

    def connection_lost(self, error: Exception | None) -> None:
        self._kill_process_group()
        self._process.wait()
        self.holder = self._marker.holder
        self._marker.close()
        self._pool.died(self)

    def _kill_process_group(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


def _blamed(worker: _Worker) -> set[_PendingCall]:
    """The calls that certainly brought a worker down; where there is none, every suspect gets a strike.

    A crash is the doing of the call that had the thread. A worker is killed because it kept a call beyond its
    deadline: the doing of the call that had the thread, if its own deadline has passed too, and of every overdue
    call if none had it. A call that lost its time to another is innocent.
    """
    now = time.monotonic()
    holder = worker.calls.get(worker.holder)
    overdue = {call for call in worker.calls.values() if call.deadline <= now}
    if holder and (not worker.is_killed or holder in overdue):
        return {holder}
    if worker.is_killed and not holder:
        return overdue
    for call in overdue | {holder} if holder else worker.calls.values():
        call.strikes += 1
    return set()


def _shared_memory_file() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("lockstep-reward"), "r+b")
    return tempfile.TemporaryFile()


def _start_process(socket_fd: int, marker_fd: int) -> subprocess.Popen[bytes]:
    """A worker that does not import the caller's __main__, in a process group of its own, out of Ctrl-C's reach.

    What rewards print goes to standard error: standard output belongs to the command.
    """
    return subprocess.Popen(
        [
            sys.executable,
            "-u",
            "-P",
            "-c",
            _BOOT,
            json.dumps(sys.path),
            str(socket_fd),
            str(marker_fd),
            str(os.getpid()),
        ],
        stdin=subprocess.DEVNULL,
        stdout=2,
        pass_fds=(socket_fd, marker_fd),
        process_group=0,
    )


def _sent_fields(sample: Sample, name: RewardName) -> dict[str, Any]:
    if not name.is_custom:
        return {field_name: getattr(sample, field_name) for field_name in _LIGHT_FIELDS}
    return {f.name: getattr(sample, f.name) for f in fields(sample) if f.name not in _HEAVY_FIELDS}


def _verdicts(reply: Judged | Failed, num_samples: int) -> list[Verdict]:
    if isinstance(reply, Failed):
        return [Verdict(reply.outcome, detail=reply.detail)] * num_samples
    try:
        verdicts: list[Verdict] = pickle.loads(reply.verdicts)
    except Exception as error:
        detail = f"{error!r}\nThe worker's answer cannot be read here; return plain values and keep them in metadata."
        return [Verdict(Outcome.EXCEPTION, detail=detail)] * num_samples
    return verdicts


def _stopping_error(name: RewardName, sample: Sample, verdict: Verdict) -> RewardError:
    return RewardError(
        f"the reward of sample {sample.index} by {name.option} {name.value}",
        str(verdict.outcome),
        f"{verdict.detail.splitlines()[0]}.",
        "Mend the reward, or choose --reward-failure-policy drop or zero to count such samples and go on.",
    )
