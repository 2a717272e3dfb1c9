"""What a run shows and stores: metrics, logs and debug data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lockstep.config import checks
from lockstep.config.base import OptionGroup
from lockstep.errors import OptionError


class LoggingOptions(OptionGroup):
    """Metrics and where they go."""

    run_dir: str = "runs/default"
    """Folder of this run: metrics.jsonl, samples, the report. Default: runs/ and the recipe's name."""
    use_wandb: bool = False
    """Log to Weights & Biases."""
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """How wandb runs. Default: wandb's own choice."""
    wandb_dir: str | None = None
    """Folder of wandb's files. Default: run_dir."""
    wandb_key: str | None = Field(default=None, repr=False, exclude=True)
    """API key. It is a secret, so it is never written to a file; WANDB_API_KEY in the environment does the same."""
    wandb_host: str | None = None
    """Address of a wandb server of your own."""
    wandb_team: str | None = None
    """The wandb entity."""
    wandb_group: str | None = None
    """The wandb group, also the run's name."""
    wandb_project: str | None = None
    """The wandb project."""
    wandb_run_id: str | None = None
    """Continue this wandb run."""
    disable_wandb_random_suffix: bool = False
    """Do not append random letters to the wandb group."""
    wandb_always_use_train_step: bool = False
    """Use the optimizer step as wandb's step for rollout metrics too."""
    use_tensorboard: bool = False
    """Write TensorBoard files below run_dir."""
    tb_project_name: str | None = None
    """TensorBoard's project folder."""
    tb_experiment_name: str | None = None
    """TensorBoard's experiment folder."""
    log_multi_turn: bool = False
    """Report response lengths with and without the tools' tokens, and `metadata['round_number']`, as multi_turn/*."""
    log_passrate: bool = False
    """Report pass@k of the training groups."""
    log_reward_category: str | None = None
    """Count rewards by this key of the reward dict."""
    log_correct_samples: bool = False
    """Report length and entropy of the samples with reward 1 apart, as rollout/correct_*."""
    custom_rollout_log_function_path: str | None = None
    """Function `(rollout_id, args, samples, extra_metrics, rollout_time) -> bool`; True skips the default metrics."""
    custom_eval_rollout_log_function_path: str | None = None
    """Function `(rollout_id, args, data, extra_metrics) -> bool`; True skips the default metrics."""


class DebugOptions(OptionGroup):
    """Running half of the loop, and storing what passes between the halves."""

    debug_rollout_only: bool = False
    """Sample and score, do not train."""
    debug_train_only: bool = False
    """Sample nothing: train on stored rollouts (load_debug_rollout_data), or by sft_loss on the data itself."""
    save_debug_rollout_data: str | None = None
    """File for each rollout's samples; `{rollout_id}` in it is replaced, for evaluations by `eval_` and the number."""
    load_debug_rollout_data: str | None = None
    """File with a rollout's samples to train on; `{rollout_id}` in it is replaced. Implies debug_train_only."""
    load_debug_rollout_data_subsample: Annotated[float, Field(gt=0, le=1)] | None = None
    """Fraction of the loaded groups to keep, the first ones."""
    save_debug_train_data: str | None = None
    """File for each rollout's training data; `{rollout_id}` in it is replaced."""

    @property
    def samples_nothing(self) -> bool:
        return self.debug_train_only or self.load_debug_rollout_data is not None

    @model_validator(mode="after")
    def _halves_must_be_consistent(self) -> DebugOptions:
        checks.only_the_rollout_may_vary(
            {
                "--save-debug-rollout-data": self.save_debug_rollout_data,
                "--load-debug-rollout-data": self.load_debug_rollout_data,
                "--save-debug-train-data": self.save_debug_train_data,
            }
        )
        if self.debug_rollout_only and self.samples_nothing:
            raise OptionError(
                "--debug-rollout-only", True, "the other debug options ask for training only.", "Use one of the two."
            )
        if self.load_debug_rollout_data_subsample is not None and self.load_debug_rollout_data is None:
            raise OptionError(
                "--load-debug-rollout-data-subsample",
                self.load_debug_rollout_data_subsample,
                "no data is loaded.",
                "Give --load-debug-rollout-data.",
            )
        if self.save_debug_train_data is not None and self.save_debug_train_data == self.save_debug_rollout_data:
            raise OptionError(
                "--save-debug-train-data",
                self.save_debug_train_data,
                "--save-debug-rollout-data writes to the same file.",
                "Give each a file of its own.",
            )
        return self
