"""The objects of one run, and how they are saved and resumed at a step border."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from lockstep.algorithms import AdvantageEstimator
from lockstep.checkpoint.hf import OnBytes, read_hf_config
from lockstep.checkpoint.training import (
    checkpoint_folder,
    delete_old_checkpoints,
    how_to_go_on_without,
    list_checkpoints,
    random_states,
    read_state,
    restore_random_states,
    save_checkpoint,
)
from lockstep.config import Args, Config
from lockstep.data.choose_source import DataSource, SlimeDataSource
from lockstep.data.sample_json import sample_from_json, sample_to_json
from lockstep.earlier import set_aside
from lockstep.errors import CheckpointError, OptionError, writing
from lockstep.plan.meter import MemoryMeter, NoMeter
from lockstep.rollout.engine import RolloutEngine
from lockstep.rollout.generate import RolloutContext
from lockstep.tracking import TrackerGroup, make_trackers
from lockstep.trainer.engine import TrainingEngine
from lockstep.types import Group

logger = logging.getLogger(__name__)

_NOTES = {"transformers_version", "_name_or_path", "dtype", "torch_dtype"}
"""Fields of config.json that may differ between the run and its continuation."""
_AHEAD = "rollout_{}.json"
"""File of a checkpoint with a rollout that was sampled and not yet trained on."""
_RECORDS = ("metrics.jsonl", "config.toml", "report.html", "samples", "tensorboard")
"""What a run leaves in its folder."""


@dataclass(frozen=True)
class FinishedRollout:
    """Scored groups, and what is measured of them."""

    groups: list[Group]
    metrics: dict[str, float]

    def with_metrics(self, more: Mapping[str, float]) -> FinishedRollout:
        return replace(self, metrics={**more, **self.metrics})


@dataclass
class Run:
    """Everything that the loop works with."""

    config: Config
    args: Args
    tokenizer: Any
    trainer: TrainingEngine
    engine: RolloutEngine | None
    """None when nothing is sampled (SFT without evaluation, training on saved rollouts)."""
    data_source: DataSource
    rollout_function: Callable[..., Any]
    eval_function: Callable[..., Any] | None
    context: RolloutContext | None
    advantage_estimator: AdvantageEstimator | None
    reward_post_process: Callable[..., Any] | None
    data_postprocess: Callable[..., Any] | None
    run_dir: Path
    num_rollout: int
    next_rollout_id: int = 0
    kv_tokens: int | None = None
    """Tokens of each embedded engine's cache. It decides who is preempted, so a run that is resumed on as many ranks
    keeps the number."""
    checkpoint: Path | None = None
    """Where it was resumed from."""
    ahead: dict[int, FinishedRollout] = field(default_factory=dict)
    """Rollouts that are finished and not yet trained on, by id."""
    unlogged: dict[str, float] | None = None
    """Metrics of a step that was trained, but whose evaluation was cut off; the step before `next_rollout_id`."""
    trackers: TrackerGroup = field(default_factory=lambda: TrackerGroup([]))
    memory: MemoryMeter = field(default_factory=NoMeter)

    sampling_version: int | None = None
    """Of the weights that the engine has been given."""

    @property
    def overlaps(self) -> bool:
        """Whether several rollouts may be under way."""
        return self.config.rollout.schedule == "async"

    def state(self) -> dict[str, Any]:
        """All counters of a step border, as JSON."""
        return {
            "next_rollout_id": self.next_rollout_id,
            "model": read_hf_config(Path(self.config.model.hf_checkpoint)),
            "params_dtype": self.config.model.params_dtype,
            "trainer": self.trainer.state_dict(),
            **data_state(self),
            "kv_tokens": self.kv_tokens,
            "num_ranks": self.config.cluster.num_ranks,
            "unlogged": self.unlogged,
        }


def data_state(run: Run) -> dict[str, Any]:
    """What the next rollout depends on, beside weights."""
    return {"data_source": run.data_source.state_dict(), "random": random_states()}


def save_run(run: Run, state: dict[str, Any], on_exported: OnBytes | None = None) -> Path | None:
    """Write a checkpoint of the step border that `state` describes; the weights must be of that border too.

    Args:
        on_exported: told how far the export of the weights is.
    Returns:
        Its folder, or None when there is nothing to do: no `--save`, nothing trained yet, or already saved.
    """
    options = run.config.checkpoint
    if options.save is None or state["next_rollout_id"] == 0:
        return None
    root, rollout_id = Path(options.save), state["next_rollout_id"] - 1
    if checkpoint_folder(root, rollout_id).exists():
        return None
    if isinstance(run.data_source, SlimeDataSource):
        run.data_source.save(rollout_id)
    with_optimizer = not options.no_save_optim
    try:
        _export(run, rollout_id, on_exported)  # first: a run killed in between repeats the step, and so the export
    finally:
        folder = save_checkpoint(
            root,
            rollout_id,
            state=state | {"with_optimizer": with_optimizer},
            config_toml=run.config.to_toml(),
            save_tensors=partial(_save_tensors, run, state.get("ahead", []), with_optimizer=with_optimizer),
        )
    _delete_old_checkpoints(run)
    return folder


def _save_tensors(run: Run, ahead: list[int], folder: Path, *, with_optimizer: bool) -> None:
    run.trainer.save(folder, with_optimizer=with_optimizer)
    for rollout_id in ahead:
        finished = run.ahead[rollout_id]
        groups = [[sample_to_json(sample) for sample in group] for group in finished.groups]
        (folder / _AHEAD.format(rollout_id)).write_text(json.dumps({"groups": groups, "metrics": finished.metrics}))


def _load_ahead(path: Path) -> FinishedRollout:
    content = json.loads(path.read_text())
    return FinishedRollout([[sample_from_json(s) for s in group] for group in content["groups"]], content["metrics"])


def _export(run: Run, rollout_id: int, on_bytes: OnBytes | None) -> None:
    if (template := run.config.checkpoint.save_hf) is not None:
        target = Path(template.format(rollout_id=rollout_id))
        run.trainer.export(target, source=Path(run.config.model.hf_checkpoint), on_bytes=on_bytes)


def _delete_old_checkpoints(run: Run) -> None:
    options = run.config.checkpoint
    if options.save is not None and options.keep_last_checkpoints is not None:
        delete_old_checkpoints(Path(options.save), options.keep_last_checkpoints)


def resume_run(run: Run, checkpoint: Path | None) -> None:
    """Put the run where the checkpoint left off; None is the start of a run.

    Raises:
        CheckpointError: it belongs to another model, or cannot be read.
    """
    if checkpoint is None:
        return
    state = read_state(checkpoint)
    try:
        _require_same_model(checkpoint, state["model"], read_hf_config(Path(run.config.model.hf_checkpoint)))
        _require_same_masters(checkpoint, state, run.config.model.params_dtype)
        _restore(run, checkpoint, state)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            str(checkpoint / "state.json"),
            "damaged",
            f"it does not hold what a run needs ({type(error).__name__}: {error}).",
            how_to_go_on_without(checkpoint),
        ) from error


def _restore(run: Run, checkpoint: Path, state: dict[str, Any]) -> None:
    run.trainer.load_state_dict(state["trainer"])
    run.trainer.load(checkpoint, with_optimizer=state["with_optimizer"])
    if not state["with_optimizer"]:
        logger.warning("%s holds no optimizer state (--no-save-optim): the moments start at zero.", checkpoint)
    run.data_source.load_state_dict(state["data_source"])
    if isinstance(run.data_source, SlimeDataSource):
        run.data_source.load(state["next_rollout_id"] - 1)
    if run.config.rollout.start_rollout_id is None:
        run.next_rollout_id, run.unlogged = state["next_rollout_id"], state["unlogged"]
        run.ahead = {ahead: _load_ahead(checkpoint / _AHEAD.format(ahead)) for ahead in state.get("ahead", [])}
    restore_random_states(state["random"])
    run.checkpoint = checkpoint


def _require_same_model(checkpoint: Path, trained: dict[str, Any], given: dict[str, Any]) -> None:
    for name in sorted((set(given) | set(trained)) - _NOTES):
        if given.get(name) != trained.get(name):
            raise CheckpointError(
                f"--load {checkpoint} ({name})",
                trained.get(name),
                f"--hf-checkpoint describes another model, whose {name} is {given.get(name)!r}.",
                "Give the --hf-checkpoint that the run began with.",
            )


def _require_same_masters(checkpoint: Path, state: dict[str, Any], given: str) -> None:
    """A master is an fp32 weight, or a bf16 weight and its remainder: one cannot go on as the other."""
    trained = state.get("params_dtype", given)  # checkpoints did not always say
    if state["with_optimizer"] and trained != given:
        raise CheckpointError(
            f"--load {checkpoint} (params_dtype)",
            trained,
            f"this run has {given}, and the masters of one type are not those of the other.",
            f"Give --params-dtype {trained}. Or begin a new run from weights that --save-hf has exported.",
        )


def require_writable(option: str, folder: Path) -> None:
    """Find out before the run, not at its first save, whether `folder` can be written to. Creates it.

    Raises:
        OptionError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OptionError(
            option,
            str(folder),
            f"it cannot be written to: {error.strerror or error}.",
            "Give a folder that you may write to.",
        ) from error


@contextmanager
def only_writer(folders: Mapping[str, Path]) -> Iterator[None]:
    """Keep other runs out of `folders` (by option) while the block lasts; a killed process keeps nobody out.

    Raises:
        OptionError: another run is writing there.
    """
    claimed = set()
    with ExitStack() as stack:
        for option, folder in folders.items():
            if folder.resolve() in claimed:
                continue
            claimed.add(folder.resolve())
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OptionError(
                    option,
                    str(folder),
                    "another run is writing to it.",
                    "Wait until that one ends, or give this one a folder of its own.",
                ) from None
            except OSError as error:
                logger.warning("%s cannot be locked (%s): take care that one run writes there.", folder, error.strerror)
        yield


def open_records(run: Run) -> list[Path]:
    """Begin the run's records, or go on with them where the checkpoint left off.

    Returns the folders to which earlier runs' records and checkpoints, which do not belong to this run, were moved.
    """
    aside = []
    with writing(run.run_dir):
        if run.checkpoint is None:
            aside.append(set_aside(run.run_dir, _RECORDS))
        run.trackers = make_trackers(run.config.logging, run.run_dir, run.config.model_dump(mode="json"))
        last_step = run.next_rollout_id - (1 if run.unlogged is None else 2)
        run.trackers.truncate_after(None if run.checkpoint is None else last_step)
        (run.run_dir / "config.toml").write_text(run.config.to_toml())
    if run.config.checkpoint.save is not None:
        aside.append(_set_other_checkpoints_aside(run, Path(run.config.checkpoint.save)))
        _delete_old_checkpoints(run)
    return [folder for folder in aside if folder is not None]


def _set_other_checkpoints_aside(run: Run, root: Path) -> Path | None:
    """Move away what `--load` would take for this run's: checkpoints of other runs, and of steps still to come."""
    existing = list_checkpoints(root)
    if run.checkpoint is not None and run.checkpoint.resolve().parent == root.resolve():
        existing = [folder for folder in existing if folder >= checkpoint_folder(root, run.next_rollout_id)]
    with writing(root):
        return set_aside(root, [folder.name for folder in existing])
