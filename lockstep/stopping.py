"""Ending a run: the first Ctrl-C (or SIGTERM) asks for a clean stop, the second stops at once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from types import FrameType, TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

_SAME_S = 0.25
"""Signals that follow the first within this time are the same request, sent twice: `timeout` and launchers signal a
process and its group."""


class Interrupted(Exception):
    """The user asked to stop while something was under way that may be abandoned."""


class GracefulStop:
    """Turns signals into a request that the loop honours between steps, or in the middle of a rollout.

    Args:
        notify: gets the sentence that tells the user what happens now.
    """

    def __init__(self, notify: Callable[[str], None]) -> None:
        self.requested = False
        self._requested_at = 0.0
        self._notify = notify
        self._task: asyncio.Task[Any] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> GracefulStop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    async def abandonable(self, work: Coroutine[Any, Any, T]) -> T:
        """Await work that a stop request may cancel.

        Raises:
            Interrupted: it was cancelled by a stop request.
        """
        task: asyncio.Task[T] = asyncio.create_task(work)
        self._task = task
        if self.requested:
            task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            if self.requested:
                raise Interrupted from None
            raise
        finally:
            self._task = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and time.monotonic() - self._requested_at < _SAME_S:
            return
        if self.requested:
            os.write(sys.stderr.fileno(), b"\nlockstep: stopped at once\n")  # a handler must not enter buffered streams
            os._exit(128 + number)
        self.requested, self._requested_at = True, time.monotonic()
        self._notify("stopping: saving a checkpoint after what cannot be interrupted (Ctrl-C again stops at once)")
        if self._task is not None:
            self._task.get_loop().call_soon_threadsafe(self._task.cancel)
