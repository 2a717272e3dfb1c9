"""What happens before the optimizer: prompts, sampling, rewards and evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lockstep.config import checks
from lockstep.config.base import Count, Fraction, Index, NonNegative, OptionGroup, Positive
from lockstep.errors import OptionError

TopK = Annotated[int, Field(ge=-1)]
"""A number of tokens, -1 for all of them."""


class DataOptions(OptionGroup):
    """Where prompts come from and how a row becomes a prompt."""

    prompt_data: str | None = None
    """Training prompts, `.jsonl` or `.parquet`; `path@[start:end]` takes a slice of the rows."""
    input_key: str = "input"
    """Key of the prompt (text or a list of messages) in a row."""
    label_key: str | None = None
    """Key of the reference answer in a row."""
    metadata_key: str = "metadata"
    """Key of the row's metadata, handed to the reward."""
    tool_key: str = "tools"
    """Key of the row's tool definitions (a list, or the list as a JSON string) for the chat template."""
    apply_chat_template: bool = False
    """Render prompts with the tokenizer's chat template. Without it a text prompt is used as it stands."""
    apply_chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Extra arguments of the chat template, as JSON: `'{"enable_thinking": false}'`."""
    data_source_path: str = "lockstep.data.RolloutDataSourceWithBuffer"
    """Class that supplies groups of samples, `package.module.Class` or `file.py:Class`."""
    rollout_shuffle: bool = False
    """Shuffle the prompts anew for each epoch."""
    rollout_seed: int = 42
    """Seed of shuffling and of sampling. Each sample's random stream depends only on it and the sample's place."""
    skip_malformed_rows: bool = False
    """Count and skip rows that cannot be used, in place of stopping with file, line and reason."""


class RolloutOptions(OptionGroup):
    """How many samples are drawn, and how."""

    rollout_batch_size: Count = 32
    """Prompts per rollout. slime has no default."""
    n_samples_per_prompt: Count = 1
    """Samples per prompt. Advantages are centred within this group, so GRPO and GSPO need at least 2."""
    num_steps_per_rollout: Count | None = None
    """Optimizer steps per rollout; without it, what global_batch_size implies."""
    global_batch_size: Count = Field(default_factory=lambda data: _samples_per_step(data))
    """Samples per optimizer step. Default: all samples of a rollout, divided by num_steps_per_rollout."""
    num_rollout: Index | None = None
    """Rollouts to run in all (a resumed run counts the earlier ones)."""
    num_epoch: Count | None = None
    """Passes over the prompts, used when num_rollout is not given."""
    start_rollout_id: Index | None = None
    """First rollout's number. Default: the checkpoint's next one, or 0."""
    over_sampling_batch_size: Count = Field(default_factory=lambda data: data.get("rollout_batch_size", 1))
    """Prompts requested at a time while a filter drops groups, at least rollout_batch_size (the default)."""
    partial_rollout: bool = False
    """Interrupt what is still being written when rollout_batch_size groups are complete; the next rollout goes on with
    it. Without it the groups that were drawn first are trained on, however long they take."""
    mask_offpolicy_in_partial_rollout: bool = False
    """Hide from the loss what earlier rollouts have written of a sample that is continued."""
    dynamic_sampling_filter_path: str | None = None
    """Function `(args, samples) -> DynamicFilterOutput | bool` that keeps or drops a finished group."""
    buffer_filter_path: str | None = None
    """Function `(args, rollout_id, buffer, num_samples) -> groups` that picks groups from the buffer."""
    rollout_function_path: str = "lockstep.rollout.generate.generate_rollout"
    """Function that replaces the whole rollout."""
    custom_generate_function_path: str | None = None
    """Async function `(args, sample, sampling_params)` that replaces the generation of one sample."""
    rollout_temperature: Positive = 1.0
    """Sampling temperature. The trainer divides its logits by it too."""
    rollout_top_p: Fraction = 1.0
    """Sample from the smallest nucleus of this probability. Below 1 the trainer renormalises over the same nucleus."""
    rollout_top_k: TopK = -1
    """Sample from this many likeliest tokens; -1 for all."""
    rollout_max_response_len: Count = 1024
    """Most tokens of a response. slime has no default."""
    rollout_max_prompt_len: Count | None = None
    """Prompts of more tokens are left out and counted."""
    rollout_max_context_len: Count | None = None
    """Most tokens of prompt and response together, all turns included. Prompts that leave no room for a response are
    left out. Default: rollout_max_prompt_len + rollout_max_response_len; without the former, the model's limit."""
    rollout_stop: tuple[str, ...] = ()
    """Texts that end a response."""
    rollout_stop_token_ids: tuple[Index, ...] = ()
    """Token ids that end a response, besides the model's own end of sequence."""
    rollout_skip_special_tokens: bool = False
    """Leave special tokens out of the response's text (never out of its tokens)."""
    rollout_sample_filter_path: str | None = None
    """Function `(args, samples) -> None` that sets `remove_sample` on what the loss should not see."""
    rollout_all_samples_process_path: str | None = None
    """Function `(args, all_samples, data_source) -> None` called with kept and dropped samples."""
    rollout_sample_hook_path: tuple[str, ...] = Field(default=(), json_schema_extra={"repeatable": True})
    """Function `(args, sample, *, rollout_id, evaluation)` called for each sample before its reward. Repeatable."""
    rollout_data_postprocess_path: str | None = None
    """Function `(args, rollout_id, rollout_data) -> None` called on the training data of a rollout."""
    custom_config_path: str | None = None
    """YAML file with values of your own, which hooks read as `args.NAME`. Names of options are refused."""
    rollout_engine: Literal["embedded", "sglang"] = "embedded"
    """Who samples: our engine, on the trainer's own parameters, or SGLang's servers (docs/sglang.md)."""
    schedule: Literal["sync", "one-step-off", "async"] = "sync"
    """What is sampled beside training, on GPUs of its own: nothing; the next rollout; or as many as max_staleness
    allows, where new weights reach samples in the middle. slime: train_async.py is one-step-off."""
    max_staleness: Index | None = None
    """Rollouts by which training may be ahead of the oldest token in a batch. Default: 0, 1 or 2, by schedule."""
    rollout_block_size: Count = 16
    """Tokens per block of the embedded engine's KV cache."""
    rollout_max_running_requests: Count = 256
    """Most samples decoded at the same time by the embedded engine."""
    rollout_max_tokens: Count | None = None
    """Tokens that the embedded engine's KV cache holds. Default: what fits in memory."""

    @model_validator(mode="after")
    def _check(self) -> RolloutOptions:
        checks.batches_must_divide(self)
        checks.staleness_must_fit_the_schedule(self)
        checks.over_sampling_must_cover_the_batch(self)
        checks.partial_rollouts_must_fit(self)
        checks.a_sample_must_fit(self)
        checks.sampling_values_must_mean_something(self)
        return self

    @property
    def longest_prompt(self) -> int | None:
        """Most tokens of a prompt that is used: rollout_max_prompt_len, or what leaves room in the context."""
        if self.rollout_max_prompt_len is None and self.rollout_max_context_len is not None:
            return self.rollout_max_context_len - 1
        return self.rollout_max_prompt_len

    @property
    def staleness_bound(self) -> int:
        """max_staleness, whether it was given or follows from the schedule."""
        if self.max_staleness is None:
            return {"sync": 0, "one-step-off": 1, "async": 2}[self.schedule]
        return self.max_staleness

    @property
    def samples_per_rollout(self) -> int:
        return self.rollout_batch_size * self.n_samples_per_prompt

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps per rollout, whether it was given or follows from global_batch_size."""
        return self.num_steps_per_rollout or self.samples_per_rollout // self.global_batch_size


def _samples_per_step(data: dict[str, Any]) -> int:
    samples: int = data.get("rollout_batch_size", 1) * data.get("n_samples_per_prompt", 1)
    return max(1, samples // (data.get("num_steps_per_rollout") or 1))


class RewardOptions(OptionGroup):
    """What a response is worth."""

    rm_type: str | None = None
    """Reward: math, dapo, deepscaler, f1, gpqa, exact, remote_rm or random; `boxed_` before it reads \\boxed{}."""
    rm_url: str | None = None
    """Address of the reward service for remote_rm."""
    custom_rm_path: str | None = None
    """Async function `(args, sample) -> float | dict` used in place of rm_type."""
    group_rm: bool = False
    """Call the reward once per group, with the list of its samples."""
    reward_key: str | None = None
    """Entry of the reward to train on, when the reward is a dict."""
    eval_reward_key: str | None = None
    """Entry of the reward to report in evaluation. Default: reward_key."""
    custom_reward_post_process_path: str | None = None
    """Function `(args, samples) -> (raw, normalised)` in place of the group normalisation."""
    reward_timeout: Positive = 30.0
    """Seconds after which a reward call is killed and counted as failed."""
    reward_num_workers: Count = 2
    """Processes that compute rewards."""
    reward_failure_policy: Literal["stop", "zero", "drop"] = "drop"
    """When a reward hangs, crashes or raises: end the run, score 0, or drop the sample. All are counted."""


class EvalOptions(OptionGroup):
    """Evaluation on held-out prompts. What is not set here falls back to the rollout's option."""

    eval_interval: Count | None = None
    """Rollouts between evaluations. Without it, the data sets are evaluated before the first and after the last one."""
    eval_prompt_data: tuple[str, ...] = ()
    """Data sets as pairs of name and path: `aime /data/aime-2024.jsonl math /data/math.jsonl@[0:500]`."""
    eval_config: str | None = None
    """YAML file with `eval.defaults` and `eval.datasets`, in place of eval_prompt_data."""
    skip_eval_before_train: bool = False
    """Do not evaluate before the first step."""
    n_samples_per_eval_prompt: Count = 1
    """Samples per evaluation prompt. Above 1, log_passrate reports pass@k."""
    eval_temperature: NonNegative | None = None
    """Sampling temperature; 0 takes the likeliest token. Default: rollout_temperature."""
    eval_top_p: Fraction | None = None
    """Default: rollout_top_p."""
    eval_top_k: TopK | None = None
    """Default: rollout_top_k."""
    eval_max_response_len: Count | None = None
    """Default: rollout_max_response_len."""
    eval_max_prompt_len: Count | None = None
    """Default: rollout_max_prompt_len."""
    eval_max_context_len: Count | None = None
    """Default: rollout_max_context_len."""
    eval_min_new_tokens: Index | None = None
    """Least tokens of a response."""
    eval_input_key: str | None = None
    """Default: input_key."""
    eval_label_key: str | None = None
    """Default: label_key."""
    eval_tool_key: str | None = None
    """Default: tool_key."""
    eval_function_path: str | None = None
    """Function that replaces the evaluation rollout. Default: rollout_function_path."""

    @model_validator(mode="after")
    def _check(self) -> EvalOptions:
        given, names = self.eval_prompt_data, self.eval_prompt_data[::2]
        if len(given) % 2:
            raise OptionError(
                "--eval-prompt-data", " ".join(given), "it is not made of pairs.", "Give a name before each path."
            )
        if len(set(names)) < len(names):
            raise OptionError(
                "--eval-prompt-data", " ".join(given), "two data sets share a name.", "Give each a name of its own."
            )
        if self.eval_interval is not None and not given and self.eval_config is None:
            raise OptionError(
                "--eval-interval",
                self.eval_interval,
                "there is no data set to evaluate on.",
                "Give --eval-prompt-data.",
            )
        if self.eval_top_k == 0:
            raise OptionError("--eval-top-k", 0, "it leaves no token to sample.", "Use -1 for all, or 1 or more.")
        return self
