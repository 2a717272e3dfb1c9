"""What a person sees while a run goes on: a live panel in a terminal, one plain line a step everywhere else.

The panel draws itself from a thread eight times a second; the training loop only changes numbers, so it may be called
from anywhere, asyncio included, and costs nothing that could be measured.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lockstep import metrics as declared
from lockstep.tracking.transfer import TransferProgress, duration, transfer_text

REFRESH_PER_SECOND = 8
HISTORY = 32
"""Values that a sparkline shows."""
SPARKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Watched:
    """A number worth a line of the panel: the first of `names` that the run logs."""

    label: str
    names: tuple[str, ...]
    format: str = ".3f"


WATCHED = (
    Watched("reward", ("rollout/raw_reward",)),
    Watched("held-out", ("eval/{name}",)),
    Watched("loss", ("train/loss",), "z.4f"),
    Watched("response length", ("rollout/response_len/mean",), ".1f"),
    Watched("entropy", ("train/entropy_loss",)),
    Watched("log-prob diff", ("train/train_rollout_logprob_abs_diff",), ".1e"),
    Watched("grad norm", ("train/grad_norm",)),
    Watched("tok/s", ("perf/tokens_per_gpu_per_sec",), ",.0f"),
    Watched("s/step", ("perf/step_time",), ".1f"),
)


@dataclass
class Phase:
    """What the run is doing now, and how far it is inside it."""

    name: str
    total: int | None
    started: float
    done: int = 0
    detail: str = ""

    def advance(self, count: int = 1) -> None:
        self.done += count


@dataclass
class _Series:
    first: float
    last: float
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))


class RunProgress:
    """Live progress of `num_steps` steps.

        with RunProgress("quickstart", num_steps=60) as progress:
            with progress.phase("rollout", total=256) as rollout:
                rollout.advance()
            progress.step(0, metrics)

    Args:
        start_step: the first step of this process, above 0 in a resumed run; the estimate of what is left starts
            there. Like `num_steps` it may be set until the progress is entered.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        name: str,
        num_steps: int,
        *,
        start_step: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.num_steps, self.start_step = name, num_steps, start_step
        self.console = console or Console()
        self.is_live = self.console.is_terminal and not self.console.is_dumb_terminal
        self._clock = clock
        self._started = clock()
        self._steps_done = 0
        self._phase: Phase | None = None
        self._series: dict[str, _Series] = {}
        self._live = Live(
            console=self.console, get_renderable=self._panel, refresh_per_second=REFRESH_PER_SECOND, transient=False
        )

    def __enter__(self) -> RunProgress:
        self._started = self._clock()
        self._steps_done = self.start_step
        if self.is_live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._phase = None
        if self.is_live:
            self._live.stop()

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Phase]:
        """Show `name` until the block ends; inside another phase, that one comes back afterwards."""
        outer, phase = self._phase, Phase(name, total, started=self._clock())
        self._phase = phase
        try:
            yield phase
        finally:
            self._phase = outer

    @contextmanager
    def transfer(self, label: str) -> Iterator[Callable[[int, int], None]]:
        """Show how far an export is that the current phase may hold; see `TransferProgress`."""
        if not self.is_live:
            with TransferProgress(label, console=self.console, clock=self._clock) as lines:
                yield lines
            return
        phase, started = self._phase, self._clock()
        assert phase is not None, "a transfer is a part of a phase"

        def show(done: int, total: int) -> None:
            phase.detail = f"{label} {transfer_text(done, total, self._clock() - started)}" if done < total else ""

        yield show

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Take in the metrics of a finished step (-1: the evaluation before training)."""
        self._steps_done = step + 1
        self.recall(metrics)
        if not self.is_live:
            self._print_plain(step_line(step, self.num_steps, watched_values(metrics), self._eta_s()))

    def recall(self, metrics: dict[str, Any]) -> None:
        """Take in the metrics of a step that an earlier process of this run has finished."""
        for label, value in watched_values(metrics).items():
            series = self._series.setdefault(label, _Series(first=value, last=value))
            series.last = value
            series.recent.append(value)

    def message(self, text: str) -> None:
        """Print a line that stays: above the panel, or between the plain lines."""
        if self.is_live:
            self.console.print(escape(text), highlight=False)
        else:
            self._print_plain(text)

    def _print_plain(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _eta_s(self) -> float | None:
        done = self._steps_done - self.start_step
        return (self._clock() - self._started) / done * (self.num_steps - self._steps_done) if done > 0 else None

    def _panel(self) -> RenderableType:
        return Panel(
            Group(self._headline(), self._phase_line(), Text(), self._numbers()),
            title=f"[bold]{escape(self.name)}",
            title_align="left",
            border_style="dim",
            padding=(0, 1),
            width=min(self.console.width, 90),
        )

    def _headline(self) -> Table:
        row = Table.grid(padding=(0, 2, 0, 0), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        eta_s = self._eta_s()
        times = f"{duration(self._clock() - self._started)} gone" + (f", {duration(eta_s)} to go" if eta_s else "")
        bar = ProgressBar(total=self.num_steps, completed=self._steps_done)
        row.add_row(Text(f"step {self._steps_done}/{self.num_steps}", style="bold"), bar, times)
        return row

    def _phase_line(self) -> Text:
        phase = self._phase
        if phase is None:
            return Text("")
        count = "" if phase.total is None else f" {phase.done}/{phase.total}"
        times = "  ".join(["", duration(self._clock() - phase.started), *filter(None, [phase.detail])])
        return Text.assemble((phase.name, "cyan"), count, (times, "dim"), no_wrap=True)

    def _numbers(self) -> RenderableType:
        if not self._series:
            return Text("The first numbers come with the first finished step.", style="dim")
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for heading in ("", "now", "first"):
            table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
        table.add_column(f"last {HISTORY}", no_wrap=True)
        for watched in WATCHED:
            if series := self._series.get(watched.label):
                now, first = (format(value, watched.format) for value in (series.last, series.first))
                table.add_row(
                    watched.label, Text(now, style="bold"), first, Text(sparkline(list(series.recent)), style="cyan")
                )
        return table


def watched_values(metrics: dict[str, Any]) -> dict[str, float]:
    """Label -> value of the watched metrics among `metrics`; of several held-out sets the first one logged.

    A value that was not finite is None in metrics.jsonl.
    """
    covers = {name: metric.name for name in metrics if (metric := declared.find(name))}
    values = {}
    for watched in WATCHED:
        found = [name for name in metrics if name in watched.names or covers.get(name) in watched.names]
        if found:
            value = metrics[found[0]]
            values[watched.label] = float("nan") if value is None else float(value)
    return values


def step_line(step: int, num_steps: int, values: dict[str, float], eta_s: float | None) -> str:
    """One step as a line of plain ASCII."""
    formats = {watched.label: watched.format for watched in WATCHED}
    parts = [f"{label} {format(value, formats[label])}" for label, value in values.items()]
    if eta_s:
        parts.append(f"{duration(eta_s)} to go")
    head = "before training" if step < 0 else f"step {step + 1}/{num_steps}"
    return "  ".join([head, *parts])


def sparkline(values: Collection[float]) -> str:
    """The values as a row of bars between their minimum and maximum; a value that is not finite shows as `?`."""
    finite = [value for value in values if abs(value) < float("inf")]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((value - low) * scale)] if abs(value) < float("inf") else "?" for value in values)
