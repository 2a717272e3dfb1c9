"""Which data source a run draws from: ours, a class with our interface, or a class with slime's."""

from __future__ import annotations

import json
from typing import Any, Protocol

from lockstep.config import Config
from lockstep.config.hooks import load_function
from lockstep.data.rows import excerpt
from lockstep.data.source import RolloutDataSourceWithBuffer
from lockstep.data.tokenizer import Tokenizer
from lockstep.errors import DataError, OptionError
from lockstep.types import Group, Sample

_NOTHING_LEFT_OUT = {"malformed_rows": 0, "over_long_prompts": 0}


class DataSource(Protocol):
    """What the loop asks of a source of prompts."""

    @property
    def counters(self) -> dict[str, int]:
        """Rows left out since the run began: `malformed_rows`, `over_long_prompts`."""
        ...

    def num_rollout(self, num_epoch: int, rollout_batch_size: int) -> int:
        """How many rollouts `num_epoch` epochs fill."""
        ...

    def get_samples(self, num_samples: int) -> list[Group]: ...

    def add_samples(self, groups: list[Group]) -> None:
        """Take groups back for a later `get_samples`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that `get_samples` depends on, as JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def make_data_source(config: Config, tokenizer: Tokenizer) -> DataSource:
    """The source that `--data-source-path` and `--prompt-data` mean.

    A class with `from_config(config, tokenizer)` is built by that; any other as in slime, by `cls(args)`.

    Raises:
        OptionError: the class cannot be imported or built, or misses a method.
        DataError: the data cannot be used.
    """
    path = config.data.data_source_path
    cls = load_function(path, "--data-source-path")
    if cls is RolloutDataSourceWithBuffer and config.data.prompt_data is None:
        return NoPrompts()
    if hasattr(cls, "from_config"):
        source: DataSource = cls.from_config(config, tokenizer)
        return source
    return SlimeDataSource(_build(cls, config), path, is_saved=config.checkpoint.save is not None)


def _build(cls: Any, config: Config) -> Any:
    try:
        return cls(config.args())
    except Exception as error:
        raise OptionError(
            "--data-source-path",
            config.data.data_source_path,
            f"building it as cls(args) raised {type(error).__name__}: {error}.",
            "Fix its __init__, or give it a classmethod from_config(config, tokenizer).",
        ) from error


class NoPrompts:
    """For runs that draw nothing: `lockstep eval`, and training on stored rollouts."""

    counters = _NOTHING_LEFT_OUT

    def num_rollout(self, num_epoch: int, rollout_batch_size: int) -> int:
        raise OptionError(
            "--num-epoch", num_epoch, "without --prompt-data an epoch has no length.", "Give --num-rollout."
        )

    def get_samples(self, num_samples: int) -> list[Group]:
        raise OptionError("--prompt-data", None, "there is nothing to draw from.", "Give a .jsonl or .parquet file.")

    def add_samples(self, groups: list[Group]) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class SlimeDataSource:
    """A user's class with slime's interface: `get_samples(n)`, `add_samples(groups)`, perhaps `__len__`.

    Its state is what `state_dict()` returns, in the checkpoint; a class without it keeps its own files, by
    `save(rollout_id)` and `load(rollout_id)`. Samples that come without ids are numbered here. Any other attribute is
    the user's, for rollout functions that know their source.

    Args:
        path: what `--data-source-path` says, for errors.
        is_saved: whether the run writes checkpoints.
    Raises:
        OptionError: it cannot supply samples, or cannot be saved although the run is.
    """

    def __init__(self, source: Any, path: str, *, is_saved: bool) -> None:
        self.source = source
        self.path = path
        self.num_groups = 0
        self.num_samples = 0
        for name in ("get_samples", "add_samples"):
            self._require(hasattr(source, name), f"it has no method {name}.", f"Give it {name}, as in slime.")
        self._has_state = hasattr(source, "state_dict") and hasattr(source, "load_state_dict")
        self._has_files = hasattr(source, "save") and hasattr(source, "load")
        self._require(
            self._has_state or self._has_files or not is_saved,
            "it has neither state_dict and load_state_dict nor save and load, so no checkpoint could continue it.",
            "Give it one of the pairs, or run without --save.",
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.source, name)

    @property
    def counters(self) -> dict[str, int]:
        return _NOTHING_LEFT_OUT | getattr(self.source, "counters", {})

    def num_rollout(self, num_epoch: int, rollout_batch_size: int) -> int:
        self._require(hasattr(self.source, "__len__"), "--num-epoch needs its __len__.", "Give --num-rollout.")
        rollouts = num_epoch * len(self.source) // rollout_batch_size
        self._require(rollouts > 0, "its rows do not fill one rollout.", "Raise --num-epoch.")
        return rollouts

    def get_samples(self, num_samples: int) -> list[Group]:
        groups: list[Group] = self.source.get_samples(num_samples)
        for group in groups:
            for sample in group:
                self._number(sample)
            self.num_groups += 1
        return groups

    def add_samples(self, groups: list[Group]) -> None:
        self.source.add_samples(groups)

    def state_dict(self) -> dict[str, Any]:
        """A copy, so that it stays what it is when the source goes on.

        Raises:
            DataError: the source's state holds a value that JSON cannot.
        """
        state = {"num_groups": self.num_groups, "num_samples": self.num_samples}
        if not self._has_state:
            return state
        own = self.source.state_dict()
        try:
            return state | {"source": json.loads(json.dumps(own))}
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{self.path}.state_dict()", excerpt(own), f"it is not JSON: {error}.", "Return plain values."
            ) from error

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_groups, self.num_samples = state["num_groups"], state["num_samples"]
        if self._has_state:
            self.source.load_state_dict(state["source"])

    def save(self, rollout_id: int) -> None:
        """Let a source that keeps its own files write them; they hold what it is now."""
        if not self._has_state and self._has_files:
            self.source.save(rollout_id)

    def load(self, rollout_id: int) -> None:
        if not self._has_state and self._has_files:
            self.source.load(rollout_id)

    def _number(self, sample: Sample) -> None:
        """Random streams and groups go by these ids, so two samples may not share them by lacking them."""
        if sample.group_index is None:
            sample.group_index = self.num_groups
        if sample.index is None:
            sample.index = self.num_samples
        if sample.rollout_id is None:
            sample.rollout_id = sample.index
        self.num_samples += 1

    def _require(self, holds: bool, reason: str, remedy: str) -> None:
        if not holds:
            raise OptionError("--data-source-path", self.path, reason, remedy)
