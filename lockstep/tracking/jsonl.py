"""metrics.jsonl: one JSON object a step, the record that reports and resumed runs read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from lockstep.errors import DataError, RolloutError

FILE_NAME = "metrics.jsonl"


def plain_metrics(metrics: dict[str, Any]) -> dict[str, float]:
    """The metrics as Python numbers: scalars of NumPy and torch are unpacked.

    Raises:
        RolloutError: a value is not one number (a hook may return anything).
    """
    return {name: _plain_number(name, value) for name, value in metrics.items()}


def _plain_number(name: str, value: Any) -> float:
    unpacked = value.item() if getattr(value, "size", None) == 1 or getattr(value, "ndim", None) == 0 else value
    if not isinstance(unpacked, int | float):
        raise RolloutError(
            f"metric {name}", str(value), "A metric is one number.", "Return a number, such as the mean."
        )
    return int(unpacked) if isinstance(unpacked, bool) else unpacked


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Every complete line of a metrics.jsonl; one that a kill left half-written at the end is not complete.

    Raises:
        DataError: a complete line is not a JSON object with a step.
    """
    if not path.exists():
        return []
    complete, _, _ = path.read_bytes().rpartition(b"\n")
    return [_parse(f"{path}:{number}", line) for number, line in enumerate(complete.splitlines(), start=1)]


def _parse(place: str, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        shown = line[:80].decode(errors="replace")
        raise DataError(place, shown, "It is not a JSON object with a whole-number step.", "Remove or repair the line.")
    return row


def _write_durably(file: BinaryIO, rows: Iterable[dict[str, Any]]) -> None:
    file.writelines(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows)
    file.flush()
    os.fsync(file.fileno())


class JsonlTracker:
    """Appends each step to `run_dir/metrics.jsonl`.

    A line is on the disk when `log` returns. So a run that logs step k before it saves the checkpoint of step k finds
    the line again whatever happens afterwards, and after `truncate_after(k)` each step stands once. A number that is
    not finite is written as null, because JSON has no other word for it.
    """

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / FILE_NAME
        self._cut_half_written_line()
        self._last_step = self._read_last_step()

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        assert self._last_step is None or step > self._last_step, (
            f"step {step} after step {self._last_step} in {self.path}: truncate_after comes first when a run resumes"
        )
        numbers = plain_metrics(metrics)
        row = {"step": step} | {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        with self.path.open("ab") as file:
            _write_durably(file, [row])
        self._last_step = step

    def truncate_after(self, step: int | None) -> None:
        """Drop the steps after `step` (None: all). A kill leaves the old file or the new one, nothing between."""
        rows = [row for row in read_steps(self.path) if step is not None and row["step"] <= step]
        replacement = self.path.with_suffix(".jsonl.new")
        with replacement.open("wb") as file:
            _write_durably(file, rows)
        replacement.replace(self.path)
        self._last_step = self._read_last_step()

    def close(self) -> None:
        """Nothing: the file is open only while a line is written."""

    def _cut_half_written_line(self) -> None:
        if self.path.exists():
            content = self.path.read_bytes()
            os.truncate(self.path, content.rfind(b"\n") + 1)

    def _read_last_step(self) -> int | None:
        rows = read_steps(self.path)
        return rows[-1]["step"] if rows else None
