"""TensorBoard event files, written with the tensorboard package alone (no TensorFlow)."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.errors import OptionError

if TYPE_CHECKING:
    from lockstep.config import LoggingOptions


class TensorBoardTracker:
    """One scalar per metric below `$TENSORBOARD_DIR`, or `run_dir/tensorboard[/project][/experiment]` without it."""

    def __init__(self, options: LoggingOptions, run_dir: Path) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise OptionError(
                "--use-tensorboard",
                True,
                f"The tensorboard package cannot be imported ({error}).",
                "Install it with `pip install tensorboard`, or leave the option out.",
            ) from error
        self._event, self._summary = event_pb2, summary_pb2
        default = run_dir / "tensorboard" / (options.tb_project_name or "") / (options.tb_experiment_name or "")
        self.log_dir = Path(os.environ.get("TENSORBOARD_DIR", default))
        self._writer = EventFileWriter(str(self.log_dir))

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        values = [self._summary.Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._add(step, summary=self._summary.Summary(value=values))

    def truncate_after(self, step: int | None) -> None:
        """Tell TensorBoard that a new session starts after `step`; it then hides what older sessions wrote later."""
        first = 0 if step is None else step + 1
        self._add(first, session_log=self._event.SessionLog(status=self._event.SessionLog.START))

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, **content))
        self._writer.flush()
