"""How far a load or an export of weights is: nothing while it is quick, a bar in a terminal, else a line at times."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

SHOW_AFTER_S = 2.0
LINE_EVERY_S = 10.0


class TransferProgress:
    """Takes the bytes done and the bytes in all, as often as one likes.

        with TransferProgress("loading") as progress:
            progress(2**20, 2**30)

    A terminal gets a bar once the transfer has taken `SHOW_AFTER_S`, and anything else a line every `LINE_EVERY_S`. One
    that was shown ends with a line that stays.

    Args:
        console: standard error unless given; on one that a live display holds already nothing but lines is possible.
        clock: seconds that only grow.
    """

    def __init__(
        self, label: str, *, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.label = label
        self.console = console or Console(file=sys.stderr)
        self._clock = clock
        self._started = self._line_due = 0.0
        self._done = self._total = 0
        self._is_shown = False
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> TransferProgress:
        self._started = self._clock()
        self._line_due = self._started + LINE_EVERY_S
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._is_shown and error is None:
            self._print(transfer_text(self._done, self._total, self._clock() - self._started))

    def __call__(self, done: int, total: int) -> None:
        self._done, self._total = done, total
        now = self._clock()
        text = transfer_text(done, total, now - self._started)
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            if self._bar is None and now - self._started >= SHOW_AFTER_S:
                self._start_bar(total)
            if self._bar is not None and self._task is not None:
                self._bar.update(self._task, completed=done, total=total, text=text)
        elif now >= self._line_due and done < total:
            self._is_shown, self._line_due = True, now + LINE_EVERY_S
            self._print(text)

    def _start_bar(self, total: int) -> None:
        self._is_shown = True
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}")
        self._bar = Progress(*columns, console=self.console, transient=True)
        self._task = self._bar.add_task(self.label, total=total, text="")
        self._bar.start()

    def _print(self, text: str) -> None:
        self.console.print(f"{self.label} {text}", markup=False, highlight=False, soft_wrap=True)


def transfer_text(done: int, total: int, elapsed_s: float) -> str:
    """`3.1 of 61.1 GB, 1.5 GB/s, 39s to go`; of a finished one `61.1 GB in 41s, 1.5 GB/s`."""
    rate = done / elapsed_s if elapsed_s > 0 else 0.0
    if done >= total:
        return f"{total / 1e9:.1f} GB in {duration(elapsed_s)}, {rate / 1e9:.1f} GB/s"
    left = f", {duration((total - done) / rate)} to go" if rate else ""
    return f"{done / 1e9:.1f} of {total / 1e9:.1f} GB, {rate / 1e9:.1f} GB/s{left}"


def duration(seconds: float) -> str:
    """`7s`, `3m20s`, `2h05m`, `3d04h`."""
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"
