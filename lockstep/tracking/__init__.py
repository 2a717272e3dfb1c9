"""Where a run's numbers go: metrics.jsonl always, TensorBoard and wandb when asked, and the terminal.

`make_trackers` picks the sinks once; after that the loop knows one `Tracker`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.tracking.jsonl import JsonlTracker, plain_metrics
from lockstep.tracking.progress import RunProgress
from lockstep.tracking.protocol import Tracker

if TYPE_CHECKING:
    from lockstep.config import LoggingOptions

__all__ = ["JsonlTracker", "RunProgress", "Tracker", "TrackerGroup", "make_trackers"]


class TrackerGroup:
    """Hands every step to several trackers, in order."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = list(trackers)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        numbers = plain_metrics(metrics)
        for tracker in self.trackers:
            tracker.log(step, numbers)

    def truncate_after(self, step: int | None) -> None:
        for tracker in self.trackers:
            tracker.truncate_after(step)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


def make_trackers(options: LoggingOptions, run_dir: Path, config: dict[str, Any]) -> TrackerGroup:
    """The sinks that the options ask for, metrics.jsonl first.

    Args:
        config: the resolved options, which wandb shows beside the run.
    Raises:
        OptionError: the package of a sink is not installed, or wandb refuses to start.
    """
    trackers: list[Tracker] = [JsonlTracker(run_dir)]
    if options.use_tensorboard:
        from lockstep.tracking.tensorboard import TensorBoardTracker

        trackers.append(TensorBoardTracker(options, run_dir))
    if options.use_wandb:
        from lockstep.tracking.wandb import WandbTracker

        trackers.append(WandbTracker(options, run_dir, config))
    return TrackerGroup(trackers)
