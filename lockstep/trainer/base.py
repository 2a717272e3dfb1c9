"""What every training engine is told, counts, and does alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from torch import Tensor

from lockstep.algorithms import Loss
from lockstep.checkpoint.tensors import load_tensors, save_tensors
from lockstep.config import BatchingOptions, OptimizerOptions
from lockstep.models import LanguageModel
from lockstep.trainer.batch import MicroBatch, pack_by_count, pack_by_tokens
from lockstep.trainer.blocks import require_the_same_blocks
from lockstep.trainer.engine import LogProbs
from lockstep.trainer.optimizer import Optimizer, learning_rate


class TrainerOptions(TypedDict):
    """How an engine trains, whatever it runs on."""

    loss: Loss
    optimizer: OptimizerOptions
    batching: BatchingOptions
    temperature: float
    """The sampler's; logits are divided by it here too."""
    needs_entropy: bool
    """Report (and let the loss use) the entropy of every prediction."""
    routing: Literal["own", "rollout", "old"]
    """Whose experts serve training: the router's own (compared with the sampler's, where recorded), the sampler's
    ("rollout", R3), or those of the pass that computed the old log-probs ("old", R2)."""
    num_steps: int
    """Optimizer steps of the whole run, for the learning-rate schedule."""
    on_micro_batch: NotRequired[Callable[[int], None]]
    """Called after each micro-batch with its number of samples, for progress."""


class Trainer(ABC):
    """A part of a training engine, which sets `optimizer` and says by `_state` what a checkpoint holds of it."""

    optimizer: Optimizer

    def __init__(self, model: LanguageModel, reference: LanguageModel | None, options: TrainerOptions) -> None:
        self.model = model
        self.reference = reference
        self.loss = options["loss"]
        self.optimizer_options = options["optimizer"]
        self.batching = options["batching"]
        self.temperature = options["temperature"]
        self.needs_entropy = options["needs_entropy"]
        self.routing = options["routing"]
        self.num_steps = options["num_steps"]
        self.on_micro_batch: Callable[[int], None] = options.get("on_micro_batch", lambda _: None)
        self.version = 0
        self.is_at_work = False
        self.num_steps_done = 0
        self._reference_moved = False

    def save(self, folder: Path, *, with_optimizer: bool = True) -> None:
        """Called by all ranks, where there are several; each writes what it holds."""
        save_tensors(folder, dict(self._state(with_optimizer)))

    def load(self, folder: Path, *, with_optimizer: bool = True) -> None:
        """Called by all ranks; whatever engine and layout has written the folder.

        Raises:
            CheckpointError: as `load_tensors`, or the folder has 8-bit moments whose blocks end elsewhere.
        """
        state = dict(self._state(with_optimizer))
        require_the_same_blocks(folder, state)
        load_tensors(folder, state)
        if not with_optimizer:
            self.optimizer.restart()

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

    @abstractmethod
    def _state(self, with_optimizer: bool) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of a checkpoint, themselves and not copies."""

    def _model(self, reference: bool) -> LanguageModel:
        if not reference:
            return self.model
        assert self.reference is not None, "no reference model was loaded"
        return self.reference

    def _bins(self, lengths: Sequence[int], max_tokens: int | None) -> list[list[int]]:
        """Indices of the samples of each micro-batch."""
        if self.batching.use_dynamic_batch_size and max_tokens:
            return pack_by_tokens(lengths, max_tokens)
        return pack_by_count(len(lengths), self.batching.micro_batch_size)

    @property
    def _chunk_rows(self) -> int | None:
        return self.batching.log_probs_chunk_size if self.batching.log_probs_chunk_size > 0 else None

    def _loss(self, batch: MicroBatch, policy_R: Tensor, entropy_R: Tensor | None, totals: dict[str, float]) -> Tensor:
        """The micro-batch's loss; its metrics are added to `totals`."""
        output = self.loss(batch.loss_inputs(policy_R, entropy_R))
        for name, value in output.metrics.items():
            totals[name] = totals.get(name, 0.0) + float(value)
        return output.loss

    def _update(
        self, update: Callable[[float], float], totals: dict[str, float], *, num_samples: int
    ) -> dict[str, float]:
        """End a step.

        Args:
            update: takes the learning rate and returns the norm of the gradients.
            totals: of the loss's metrics, over all samples.
        Returns:
            The step's metrics.
        """
        lr = learning_rate(self.optimizer_options, self.num_steps_done, num_steps=self.num_steps)
        updates_before = self.optimizer.num_updates
        grad_norm = update(lr)
        self.num_steps_done += 1
        self.version += 1
        return {f"train/{name}": value for name, value in totals.items()} | {
            "train/grad_norm": grad_norm,
            "train/lr-pg_0": lr,
            "train/skipped_steps": float(self.optimizer.num_updates == updates_before),
            "train/global_batch_size": float(num_samples),
        }


def per_sample(batch: MicroBatch, log_probs_R: Tensor, flips_T: Tensor | None) -> list[LogProbs]:
    """The results of one micro-batch, one sample after the other.

    Args:
        flips_T: nonzero where a token's experts are not the recorded ones; rows of padding may follow.
    """
    lengths, responses = batch.lengths, batch.response_lengths
    differs: list[Tensor | None] = [None] * len(lengths)
    if flips_T is not None:
        per_token = flips_T[: sum(lengths)].cpu().split(lengths)
        differs = [
            flips.cumsum(0)[length - 1 - response : length - 1] > 0
            for flips, length, response in zip(per_token, lengths, responses, strict=True)
        ]
    return [
        LogProbs(log_probs, differ)
        for log_probs, differ in zip(log_probs_R.cpu().split(responses), differs, strict=True)
    ]
