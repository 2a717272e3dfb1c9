"""Every error a user can meet, as one tree. Each says four things: field, value, reason, remedy.

    LockstepError
    ├── OptionError       an option's value is impossible (exit code 2)
    ├── DataError         a row, a file or a chat template is unusable
    ├── ModelError        an HF config or a weight does not fit the model
    ├── CheckpointError   a checkpoint cannot be written or read
    ├── OutputError       a file of the run (metrics, samples, report) cannot be written
    ├── RolloutError      sampling cannot go on (engine, custom generate, empty batch)
    ├── RewardError       a reward failed under the policy "stop"
    ├── RankError         a process of the run died, failed or fell silent
    └── ParityError       sampler and trainer disagree beyond the user's limit

They also are the nearest built-in exception, stay picklable (they cross process borders), and the command line prints
them without a traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class LockstepError(Exception):
    """`field` is `value`: `reason` `remedy`; without "is" where there is no value (None).

    Args:
        field: what the user set or supplied, by the name they know it (`--rollout-batch-size`, `data.jsonl:17`).
        value: what was found there.
        reason: why it cannot work, as a sentence.
        remedy: what to do instead, as a sentence.
    """

    exit_code = 1

    def __init__(self, field: str, value: Any, reason: str, remedy: str) -> None:
        super().__init__(field, value, reason, remedy)
        self.field, self.value, self.reason, self.remedy = field, value, reason, remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.value, self.reason, self.remedy)  # OSError would keep two of them

    def __str__(self) -> str:
        subject = self.field if self.value is None else f"{self.field} is {self.value!r}"
        return f"{subject}: {self.reason} {self.remedy}"


class OptionError(LockstepError, ValueError):
    """An option that is unknown, or whose value cannot work with the others."""

    exit_code = 2


class DataError(LockstepError, ValueError):
    """A data file, row or chat template that cannot be used."""


class ModelError(LockstepError, ValueError):
    """An HF config or a weight that does not fit the model definition."""


class CheckpointError(LockstepError, OSError):
    """A checkpoint that cannot be written or read."""


class OutputError(LockstepError, OSError):
    """A file of the run that cannot be written."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say what cannot be written, and what to do, when the system refuses to write below `path`."""
    try:
        yield
    except LockstepError:
        raise
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError
        raise OutputError(
            str(getattr(error, "filename", None) or path),
            "not writable",
            f"the system says: {getattr(error, 'strerror', None) or str(error).splitlines()[0]}.",
            "Free space or fix the folder's permissions; with --load, a run goes on from its last checkpoint.",
        ) from error


class RolloutError(LockstepError, RuntimeError):
    """Sampling that cannot go on."""


class RewardError(LockstepError, RuntimeError):
    """A reward that failed while the user's policy is to stop."""


class RankError(LockstepError, RuntimeError):
    """A process of the run that died, failed or gave no sign of life. The run cannot go on without it."""


class ParityError(LockstepError, RuntimeError):
    """Sampler and trainer log-probs that differ by more than the user's limit."""
