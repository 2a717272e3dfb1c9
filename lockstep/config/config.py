"""`Config`: all options of a run, typed, frozen and checked when built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lockstep.config import compatibility
from lockstep.config.args import HIDDEN, Args, read_custom_values
from lockstep.config.base import OptionGroup
from lockstep.config.machine import ClusterOptions, ParallelOptions, SglangOptions, WeightSyncOptions
from lockstep.config.model import CheckpointOptions, ModelOptions
from lockstep.config.observing import DebugOptions, LoggingOptions
from lockstep.config.reporting import first_error, unknown_option, unknown_table
from lockstep.config.rollout import DataOptions, EvalOptions, RewardOptions, RolloutOptions
from lockstep.config.training import AlgorithmOptions, BatchingOptions, OptimizerOptions
from lockstep.errors import OptionError

PREFIXES = {"sglang_": "server_args", "router_": "router_args"}
"""Options of any name that are collected for SGLang, and the dict that holds them."""


class Config(BaseModel):
    """One attribute per group of options; the tables of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: ModelOptions
    checkpoint: CheckpointOptions = Field(default_factory=CheckpointOptions)
    data: DataOptions = Field(default_factory=DataOptions)
    rollout: RolloutOptions = Field(default_factory=RolloutOptions)
    reward: RewardOptions = Field(default_factory=RewardOptions)
    algorithm: AlgorithmOptions = Field(default_factory=AlgorithmOptions)
    optimizer: OptimizerOptions = Field(default_factory=OptimizerOptions)
    batching: BatchingOptions = Field(default_factory=BatchingOptions)
    eval: EvalOptions = Field(default_factory=EvalOptions)
    logging: LoggingOptions = Field(default_factory=LoggingOptions)
    debug: DebugOptions = Field(default_factory=DebugOptions)
    cluster: ClusterOptions = Field(default_factory=ClusterOptions)
    parallel: ParallelOptions = Field(default_factory=ParallelOptions)
    sglang: SglangOptions = Field(default_factory=SglangOptions)
    weight_sync: WeightSyncOptions = Field(default_factory=WeightSyncOptions)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Build from options by name, flat (`{"lr": 1e-6}`) or in their tables (`{"optimizer": {"lr": 1e-6}}`).

        Raises:
            OptionError: a name is unknown or in the wrong table, or a value cannot work.
        """
        flat = flatten(values)
        compatibility.refuse_unavailable(flat)
        tables: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
        for name, value in flat.items():
            if name in HOME:
                tables[HOME[name]][name] = value
        try:
            return cls.model_validate(tables)
        except ValidationError as error:
            raise first_error(error) from None

    def args(self) -> Args:
        """The flat read-only view that hooks get: our options, neutral values for slime's other ones, the user's own.

        Secrets are not in it: it travels to reward workers and may be printed.

        Raises:
            OptionError: `--custom-config-path` cannot be used.
        """
        neutral = {entry.name: entry.neutral for entry in compatibility.FLAGS.values()}
        ours = {name: getattr(getattr(self, group), name) for name, group in HOME.items()}
        secrets = {name: HIDDEN for name in SECRETS if ours[name] is not None}
        path = self.rollout.custom_config_path
        return Args(neutral | ours | secrets | (read_custom_values(path, KNOWN_NAMES) if path else {}))

    def to_toml(self) -> str:
        """A recipe that loads as an equal config. Options that are None, and secrets, are left out."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


GROUPS: dict[str, type[OptionGroup]] = {
    name: cast("type[OptionGroup]", field.annotation) for name, field in Config.model_fields.items()
}
"""Table name -> its model."""

HOME: dict[str, str] = {name: group for group, model in GROUPS.items() for name in model.model_fields}
"""Option name -> its table."""

SECRETS: tuple[str, ...] = tuple(
    name for model in GROUPS.values() for name, field in model.model_fields.items() if field.exclude
)
"""Options that no file and no hook sees."""

KNOWN_NAMES: frozenset[str] = frozenset(HOME) | frozenset(compatibility.FLAGS) | frozenset(compatibility.ALIASES)
"""Every name that is not an error: our options and what slime's scripts may spell out."""


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name, out of tables and top-level keys; aliases and shorthands resolved, SGLang's names collected.

    Raises:
        OptionError: a key is unknown, or stands in the wrong table.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if key in GROUPS and isinstance(value, Mapping):
            for name, entry in value.items():
                _check_table(name, entry, key)
                _put(flat, name, entry, f" in table [{key}]")
        elif isinstance(value, Mapping) and key not in KNOWN_NAMES and key not in PREFIXES.values():
            raise unknown_table(key, GROUPS)
        else:
            _put(flat, key, value, "")
    return flat


def _check_table(name: str, value: Any, table: str) -> None:
    home = HOME.get(compatibility.ALIASES.get(name, name), table)
    if home != table:
        raise OptionError(
            f"{table}.{name}", value, f"{name} belongs to the table [{home}].", f"Move it below [{home}]."
        )


def _put(flat: dict[str, Any], name: str, value: Any, where: str) -> None:
    name = compatibility.ALIASES.get(name, name)
    if name in compatibility.SHORTHANDS and value in (True, "true"):
        name, value = compatibility.SHORTHANDS[name]
    prefix = next((p for p in PREFIXES if name.startswith(p)), None)
    if name in PREFIXES.values() and isinstance(value, Mapping):
        flat[name] = {**flat.get(name, {}), **value}
    elif name in KNOWN_NAMES:
        flat[name] = value
    elif prefix is not None:
        target = PREFIXES[prefix]
        flat[target] = {**flat.get(target, {}), name.removeprefix(prefix): value}
    else:
        raise unknown_option(name, value, name, KNOWN_NAMES, where)
