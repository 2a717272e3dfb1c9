"""What the loop knows of a sink."""

from __future__ import annotations

from typing import Any, Protocol


class Tracker(Protocol):
    """Takes the metrics of one step after the other."""

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Record a step. Steps grow; -1 is the evaluation before training."""

    def truncate_after(self, step: int | None) -> None:
        """Forget what was recorded for later steps (None: everything), because the run goes on from `step`."""

    def close(self) -> None:
        """Write out what is still in memory. Nothing is logged afterwards."""
