"""The process of one rank: does what the controller calls, one call after the other, and decides nothing."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from lockstep.cluster.wire import Answer, Call, Channel, Failure, News, Poke, Start
from lockstep.errors import LockstepError
from lockstep.rewards.worker import die_with_parent

_ALIVE_EVERY_S = 1.0


@dataclass
class Place:
    """Where a rank stands, and how it reports during a call."""

    rank: int
    world_size: int
    local_rank: int
    """Among the ranks of its machine."""
    notify: Callable[[News], None]
    is_poked: threading.Event
    """Set when the controller wants the present call to come back; calls that look at it clear it when they end."""
    _spoken_at: float = 0.0

    def report(self, kind: str, value: Any) -> None:
        self.notify(News(kind, value))

    def is_alive(self) -> None:
        """Call it now and then in a long call."""
        if time.monotonic() - self._spoken_at > _ALIVE_EVERY_S:
            self._spoken_at = time.monotonic()
            self.notify(News())


def main(socket_fd: int, parent_pid: int) -> None:
    """Serve the controller at the other end of the socket until it closes."""
    for number in (signal.SIGINT, signal.SIGTERM):  # both go to the whole process group and mean the controller
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(parent_pid)
    channel = Channel(socket.socket(fileno=socket_fd))
    start: Start = channel.receive()
    calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
    place = Place(start.rank, start.world_size, start.local_rank, channel.send, threading.Event())
    threading.Thread(target=_listen, args=(channel, calls, place), daemon=True).start()
    with _until_the_end():
        target = _answer(channel, 0, partial(start.make, place, *start.arguments))
        while True:
            call = calls.get()
            _answer(channel, call.number, partial(_run, target, call))


@contextlib.contextmanager
def _until_the_end() -> Iterator[None]:
    """However it ends, end without taking process groups down, which aborts now and then in threads of their own."""
    code = 1
    try:
        yield
    except OSError:  # the controller has gone
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _answer(channel: Channel, number: int, work: Callable[[], Any]) -> Any:
    """Do the work and tell the controller its outcome. What is built for call 0 stays here."""
    try:
        value = work()
    except Exception as error:
        what: Exception | str = error
        if not isinstance(error, LockstepError):
            what = "".join(traceback.format_exception_only(error)).strip()
        channel.send(Failure(number, what, traceback.format_exc()))
        return None
    channel.send(Answer(number, value if number else None))
    return value


def _run(target: Any, call: Call) -> Any:
    return getattr(target, call.method)(*call.arguments)


def _listen(channel: Channel, calls: queue.SimpleQueue[Call], place: Place) -> None:
    """Read all the time, so that the controller never waits for a rank that is at work; its end is ours."""
    try:
        while True:
            message = channel.receive()
            if isinstance(message, Poke):
                place.is_poked.set()
            else:
                calls.put(message)
    except (EOFError, OSError):
        os._exit(0)
