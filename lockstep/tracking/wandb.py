"""Weights & Biases, online or offline."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.errors import OptionError

if TYPE_CHECKING:
    from lockstep.config import LoggingOptions

STEP_METRICS = {
    "train": "train/step",
    "rollout": "rollout/step",
    "perf": "rollout/step",
    "passrate": "rollout/step",
    "multi_turn": "rollout/step",
    "eval": "eval/step",
}
"""The x axis of each family of metrics, as in slime."""


class WandbTracker:
    """Sends each step to one wandb run. A resumed run continues its own with `--wandb-run-id`."""

    def __init__(self, options: LoggingOptions, run_dir: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise OptionError(
                "--use-wandb",
                True,
                f"The wandb package cannot be imported ({error}).",
                "Install it with `pip install wandb`, or leave the option out.",
            ) from error
        try:
            if options.wandb_key and options.wandb_mode in (None, "online"):
                wandb.login(key=options.wandb_key, host=options.wandb_host)
            self._run = wandb.init(
                **_run_arguments(options, run_dir),
                config=config,
                settings=wandb.Settings(
                    console="off", **({"base_url": options.wandb_host} if options.wandb_host else {})
                ),
            )
        except wandb.errors.Error as error:
            raise OptionError(
                "--use-wandb",
                True,
                f"wandb does not start: {error}",
                "Give --wandb-key or run `wandb login`; --wandb-mode offline needs neither.",
            ) from error
        self._always_use_train_step = options.wandb_always_use_train_step
        for family, step_metric in STEP_METRICS.items():
            self._run.define_metric(f"{family}/*", step_metric=step_metric)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        families = {name.partition("/")[0] for name in metrics}
        shown_step = metrics.get("train/step", step) if self._always_use_train_step else step
        steps = {STEP_METRICS[family]: shown_step for family in families & STEP_METRICS.keys()}
        self._run.log(metrics | steps if self._always_use_train_step else steps | metrics)

    def truncate_after(self, step: int | None) -> None:
        """Nothing: wandb keeps what it was sent, and draws later points of the same step over earlier ones."""

    def close(self) -> None:
        self._run.finish()


def _run_arguments(options: LoggingOptions, run_dir: Path) -> dict[str, Any]:
    """What `wandb.init` is told. The group doubles as the run's name; as in slime both get a random suffix."""
    group = options.wandb_group
    if group and not options.disable_wandb_random_suffix:
        group = f"{group}_{secrets.token_hex(4)}"
    directory = Path(options.wandb_dir) if options.wandb_dir else run_dir
    directory.mkdir(parents=True, exist_ok=True)
    return {
        "mode": options.wandb_mode,
        "dir": str(directory),
        "entity": options.wandb_team,
        "project": options.wandb_project,
        "group": group,
        "name": group or run_dir.name,
        "id": options.wandb_run_id,
        "resume": "allow" if options.wandb_run_id else None,
    }
