"""What a training engine is: the protocol that the loop knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from lockstep.checkpoint.hf import OnBytes
from lockstep.trainer.batch import TrainSample


@dataclass(frozen=True)
class LogProbs:
    """Log-probs of one sample's response tokens under some weights."""

    log_probs: Tensor
    """[response_length] fp32 on the CPU."""
    routes_differ: Tensor | None
    """[response_length] bool: the experts chosen here differ from the sampler's at this prediction or at an earlier
    token of the sample, whose keys and values it reads. None without recorded routes."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports."""

    metrics: dict[str, float]
    """train/* metrics of the step."""
    policy: list[LogProbs]
    """Of the weights before the step, in the order of the samples."""


class TrainingEngine(Protocol):
    """Holds the weights and the optimizer. `version` counts the weight updates that samplers must know of."""

    version: int
    is_at_work: bool
    """Whether it trains on another thread now: its weights may not be read then."""

    def log_probs(self, samples: Sequence[TrainSample], *, reference: bool = False) -> list[LogProbs]:
        """Forward only, under the current weights or the frozen reference model's."""
        ...

    def step(self, samples: Sequence[TrainSample]) -> StepResult:
        """One optimizer step over a global batch whose loss weights are set."""
        ...

    def finish_update(self) -> None:
        """Wait until the last step's update has let go of its memory: it may hide behind the next step, and nothing
        else may take that memory before."""
        ...

    def update_reference(self) -> None:
        """Make the current policy the reference model."""
        ...

    def save(self, folder: Path, *, with_optimizer: bool = True) -> None:
        """Write weights and optimizer state into an existing folder."""
        ...

    def load(self, folder: Path, *, with_optimizer: bool = True) -> None:
        """Read what `save` wrote, in place. Without optimizer state the optimizer starts afresh from the weights."""
        ...

    def export(self, folder: Path, *, source: Path, on_bytes: OnBytes | None = None) -> None:
        """Write the weights as an HF folder, the rest of which is copied from `source`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Counters that belong to a checkpoint, as JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
