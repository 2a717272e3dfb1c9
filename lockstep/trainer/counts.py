"""What every training engine counts, and saves beside its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class _CountsUpdates(Protocol):
    num_updates: int


class Counts:
    """A part of a training engine; the engine sets `optimizer` and adds to `version` and `num_steps_done`."""

    optimizer: _CountsUpdates

    def __init__(self) -> None:
        self.version = 0
        self.is_at_work = False
        self.num_steps_done = 0
        self._reference_moved = False

    def state_dict(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "num_steps_done": self.num_steps_done,
            "num_updates": self.optimizer.num_updates,
            "reference_moved": self._reference_moved,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.version = state["version"]
        self.num_steps_done = state["num_steps_done"]
        self.optimizer.num_updates = state["num_updates"]
        self._reference_moved = state["reference_moved"]

    def _count_step(
        self, totals: Mapping[str, float], *, grad_norm: float, lr: float, updates_before: int, num_samples: int
    ) -> dict[str, float]:
        """One more step is done; its metrics."""
        self.num_steps_done += 1
        self.version += 1
        return {f"train/{name}": value for name, value in totals.items()} | {
            "train/grad_norm": grad_norm,
            "train/lr-pg_0": lr,
            "train/skipped_steps": float(self.optimizer.num_updates == updates_before),
            "train/global_batch_size": float(num_samples),
        }
