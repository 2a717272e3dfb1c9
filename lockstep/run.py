"""The objects of one run, and how they are saved and resumed at a step border."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.algorithms import AdvantageEstimator
from lockstep.checkpoint.hf import read_hf_config, save_hf_model
from lockstep.checkpoint.training import (
    delete_old_checkpoints,
    list_checkpoints,
    read_state,
    restore_random_states,
    save_checkpoint,
)
from lockstep.config import Args, Config
from lockstep.errors import CheckpointError
from lockstep.rollout.engine import RolloutEngine
from lockstep.rollout.generate import RolloutContext
from lockstep.tracking import TrackerGroup
from lockstep.trainer.engine import TrainingEngine

_NOTES = {"transformers_version", "_name_or_path", "dtype", "torch_dtype"}
"""Fields of config.json that may differ between the run and its continuation."""


@dataclass
class Run:
    """Everything that the loop works with."""

    config: Config
    args: Args
    tokenizer: Any
    trainer: TrainingEngine
    engine: RolloutEngine | None
    """None when nothing is sampled (SFT without evaluation, training on saved rollouts)."""
    data_source: Any
    rollout_function: Callable[..., Any]
    eval_function: Callable[..., Any] | None
    context: RolloutContext | None
    advantage_estimator: AdvantageEstimator | None
    reward_post_process: Callable[..., Any] | None
    data_postprocess: Callable[..., Any] | None
    trackers: TrackerGroup
    run_dir: Path
    num_rollout: int
    next_rollout_id: int = 0
    first_rollout_id: int = 0
    """Where this process began, above 0 when it resumed."""

    def state(self) -> dict[str, Any]:
        """All counters of a step border, as JSON."""
        return {
            "next_rollout_id": self.next_rollout_id,
            "model": read_hf_config(Path(self.config.model.hf_checkpoint)),
            "trainer": self.trainer.state_dict(),
            "data_source": self.data_source.state_dict(),
        }


def save_run(run: Run, state: dict[str, Any]) -> Path | None:
    """Write a checkpoint of the step border that `state` describes; the weights must be of that border too.

    Returns its folder, or None when there is nothing to do: no `--save`, nothing trained yet, or already saved.
    """
    options = run.config.checkpoint
    rollout_id = state["next_rollout_id"] - 1
    if options.save is None or rollout_id < 0:
        return None
    root = Path(options.save)
    if any(folder.name.endswith(f"_{rollout_id:07d}") for folder in list_checkpoints(root)) and (
        rollout_id < run.first_rollout_id
    ):
        return None
    folder = save_checkpoint(
        root, rollout_id, state=state, config_toml=run.config.to_toml(), save_tensors=run.trainer.save
    )
    if options.save_hf is not None:
        with run.trainer.rollout_weights() as model:
            target = Path(options.save_hf.format(rollout_id=rollout_id))
            save_hf_model(model, target, source=Path(run.config.model.hf_checkpoint))
    if options.keep_last_checkpoints is not None:
        delete_old_checkpoints(root, options.keep_last_checkpoints)
    return folder


def resume_run(run: Run, checkpoint: Path | None) -> None:
    """Put the run where the checkpoint left off; None is the start of a run.

    Raises:
        CheckpointError: it belongs to another model, or cannot be read.
    """
    if checkpoint is None:
        run.trackers.truncate_after(None)
        return
    state = read_state(checkpoint)
    hf_config = read_hf_config(Path(run.config.model.hf_checkpoint))
    for name in sorted((set(hf_config) | set(state["model"])) - _NOTES):
        if hf_config.get(name) != state["model"].get(name):
            raise CheckpointError(
                f"--load {checkpoint} ({name})",
                state["model"].get(name),
                f"--hf-checkpoint describes another model, whose {name} is {hf_config.get(name)!r}.",
                "Give the --hf-checkpoint that the run began with.",
            )
    run.trainer.load_state_dict(state["trainer"])
    run.trainer.load(checkpoint)
    run.data_source.load_state_dict(state["data_source"])
    if run.config.rollout.start_rollout_id is None:
        run.next_rollout_id = run.first_rollout_id = state["next_rollout_id"]
    run.trackers.truncate_after(run.next_rollout_id - 1)
    if run.engine is not None:
        run.engine.set_version(run.trainer.version)
    restore_random_states(state["random"])
