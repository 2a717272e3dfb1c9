"""The process that runs rewards, started by `pool.py`.

Everything happens on the main thread, in one event loop: async rewards share it, a plain function blocks it until it
returns. A reward that blocks it for too long is the pool's business, which then kills the process.
"""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import functools
import inspect
import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Coroutine, Generator
from dataclasses import fields
from typing import Any

from lockstep.errors import LockstepError
from lockstep.rewards.outcome import InvalidRewardError, Outcome, checked_reward
from lockstep.rewards.registry import RewardFunction, load_reward
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

_current_call: contextvars.ContextVar[int] = contextvars.ContextVar("current_call", default=0)
_PR_SET_PDEATHSIG = 1


def main(socket_fd: int, marker_fd: int, parent_pid: int) -> None:
    """Serve the pool at the other end of the socket until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the controller
    die_with_parent(parent_pid)
    asyncio.run(_serve(socket.socket(fileno=socket_fd), Marker(marker_fd)))


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies, even while it is stuck in C code.

    Elsewhere than on Linux the end of the socket has to do, which a stuck process does not see.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(0)


async def _serve(connection: socket.socket, marker: Marker) -> None:
    loop = asyncio.get_running_loop()
    loop.set_task_factory(functools.partial(_marking_task, marker))
    worker = Worker(connection, marker)
    ended = asyncio.Event()

    def read() -> None:
        if not worker.read():
            ended.set()

    loop.add_reader(connection, read)
    await ended.wait()
    os._exit(0)  # without waiting for what rewards left running


class Worker:
    """Calls under way, and the connection to the pool."""

    def __init__(self, connection: socket.socket, marker: Marker) -> None:
        self._connection = connection
        self._marker = marker
        self._received = bytearray()
        self._args: Any = None
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._cancelled: set[int] = set()

    def read(self) -> bool:
        """Take in what the pool has sent and start what it asks for; False once it has hung up."""
        try:
            data = self._connection.recv(1 << 20)
        except ConnectionError:
            return False
        self._received += data
        for message in take_messages(self._received):
            self._handle(message)
        return bool(data)

    def _handle(self, message: Options | Call | Cancel) -> None:
        match message:
            case Options(args):
                self._args = pickle.loads(args)
            case Cancel(id):
                if task := self._tasks.get(id):
                    self._cancelled.add(id)
                    task.cancel()
            case Call():
                context = contextvars.copy_context()
                context.run(_current_call.set, message.id)
                self._tasks[message.id] = asyncio.get_running_loop().create_task(self._run(message), context=context)

    def _send(self, message: Started | Judged | Failed | Refused) -> None:
        self._connection.sendall(frame(message))

    async def _run(self, call: Call) -> None:
        try:
            function = _loaded(call.reward)
            self._send(Started(call.id, is_async=_is_async(function)))
            verdicts = await judged(function, self._args, call)
            self._send(Judged(call.id, pickle.dumps(verdicts)))
        except LockstepError as error:
            self._send(Refused(call.id, error))
        except BaseException as error:  # SystemExit too: a reward does not end the worker
            self._send(self._failure(call, error))
        finally:
            del self._tasks[call.id]
            self._cancelled.discard(call.id)

    def _failure(self, call: Call, error: BaseException) -> Failed:
        if call.id in self._cancelled:
            return Failed(call.id, Outcome.TIMEOUT, "" if isinstance(error, asyncio.CancelledError) else str(error))
        return Failed(call.id, Outcome.EXCEPTION, _described(error))


_loaded = functools.cache(load_reward)


def _is_async(function: RewardFunction) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


async def judged(function: RewardFunction, args: Any, call: Call) -> list[Verdict]:
    """Run a reward on its samples: one verdict each, with the fields that it has changed."""
    samples = [Sample(**fields) for fields in pickle.loads(call.samples)]
    value = function(args, samples if call.is_group else samples[0])
    if inspect.isawaitable(value):
        value = await value
    values = value if call.is_group else [value]
    if not isinstance(values, list | tuple) or len(values) != len(samples):
        detail = f"a list of {len(samples)} rewards is needed for this group, the function returned {values!r:.200}"
        return [Verdict(Outcome.INVALID, detail=detail)] * len(samples)
    before = [Sample(**fields) for fields in pickle.loads(call.samples)]
    return [
        _verdict(value, call.reward_key, _changes(old, new))
        for value, old, new in zip(values, before, samples, strict=True)
    ]


def _verdict(value: Any, reward_key: str | None, changes: dict[str, Any]) -> Verdict:
    try:
        return Verdict(Outcome.OK, checked_reward(value, reward_key), changes=changes)
    except InvalidRewardError as error:
        return Verdict(Outcome.INVALID, detail=str(error), changes=changes)


def _changes(before: Sample, after: Sample) -> dict[str, Any]:
    """Fields in which `after` differs; what cannot be compared counts as changed."""
    names = [f.name for f in fields(Sample) if f.name != "reward"]
    return {name: getattr(after, name) for name in names if not _equal(getattr(before, name), getattr(after, name))}


def _equal(old: Any, new: Any) -> bool:
    try:
        return bool(old == new)
    except Exception:  # arrays of many elements have no truth value
        return False


def _described(error: BaseException) -> str:
    last_line = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    place = traceback.extract_tb(error.__traceback__)[-1]
    whole = "".join(traceback.format_exception(error))
    return f"{last_line} ({place.filename}:{place.lineno}, in {place.name})\n{whole}"


class _Marked(Coroutine[Any, Any, Any]):
    """A coroutine that writes its call's id into the marker for as long as it has the thread."""

    def __init__(self, marker: Marker, coroutine: Coroutine[Any, Any, Any], call_id: int) -> None:
        self._marker = marker
        self._coroutine = coroutine
        self._call_id = call_id

    def send(self, value: Any) -> Any:
        self._marker.holder = self._call_id
        try:
            return self._coroutine.send(value)
        finally:
            self._marker.holder = 0

    def throw(self, *error: Any) -> Any:
        self._marker.holder = self._call_id
        try:
            return self._coroutine.throw(*error)
        finally:
            self._marker.holder = 0

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._coroutine.__await__()


def _marking_task(
    marker: Marker,
    loop: asyncio.AbstractEventLoop,
    coroutine: Coroutine[Any, Any, Any] | Generator[Any, None, Any],
    *,
    context: contextvars.Context | None = None,
) -> asyncio.Task[Any]:
    """Task factory: tasks that a reward starts are marked as its call's, because they inherit the context."""
    call_id = context.get(_current_call, 0) if context else _current_call.get()
    assert isinstance(coroutine, Coroutine)
    return asyncio.Task(_Marked(marker, coroutine, call_id), loop=loop, context=context)
