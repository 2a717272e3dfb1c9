"""What a value must satisfy together with others, as named checks that raise errors with four parts.

The groups call those that concern one group when they are built. `check_training` and `check_evaluation` hold what one
command needs and another does not.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.config.hooks import our_path
from lockstep.errors import OptionError

if TYPE_CHECKING:
    from lockstep.config.config import Config
    from lockstep.config.rollout import RolloutOptions


def batches_must_divide(options: RolloutOptions) -> None:
    """rollout_batch_size x n_samples_per_prompt = global_batch_size x num_steps_per_rollout."""
    samples = options.samples_per_rollout
    made_of = f"{options.rollout_batch_size} prompts x {options.n_samples_per_prompt} samples = {samples} per rollout"
    steps = options.num_steps_per_rollout
    if steps is not None and samples % steps:
        raise OptionError(
            "--num-steps-per-rollout",
            steps,
            f"it does not divide the {made_of}.",
            f"Use a divisor of {samples}, such as {_nearest_divisor(samples, steps)}.",
        )
    if steps is not None and options.global_batch_size * steps != samples:
        raise OptionError(
            "--global-batch-size",
            options.global_batch_size,
            f"times {steps} steps it is {options.global_batch_size * steps}, but {made_of}.",
            f"Use {samples // steps}, or leave out --global-batch-size or --num-steps-per-rollout.",
        )
    if samples % options.global_batch_size:
        raise OptionError(
            "--global-batch-size",
            options.global_batch_size,
            f"it does not divide the {made_of}.",
            f"Use a divisor of {samples}, such as {_nearest_divisor(samples, options.global_batch_size)}.",
        )


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), -d))


def over_sampling_must_cover_the_batch(options: RolloutOptions) -> None:
    if options.over_sampling_batch_size < options.rollout_batch_size:
        raise OptionError(
            "--over-sampling-batch-size",
            options.over_sampling_batch_size,
            f"it is below --rollout-batch-size {options.rollout_batch_size}.",
            f"Use {options.rollout_batch_size} or more, or leave it out.",
        )


def a_sample_must_fit(options: RolloutOptions) -> None:
    context, prompt = options.rollout_max_context_len, options.rollout_max_prompt_len
    if context is not None and prompt is not None and prompt >= context:
        raise OptionError(
            "--rollout-max-prompt-len",
            prompt,
            f"a prompt of this length leaves no room for a response in --rollout-max-context-len {context}.",
            f"Use less than {context}.",
        )
    if options.rollout_max_tokens is not None and options.rollout_max_tokens < options.rollout_max_response_len:
        raise OptionError(
            "--rollout-max-tokens",
            options.rollout_max_tokens,
            f"not even one response of --rollout-max-response-len {options.rollout_max_response_len} tokens fits.",
            "Use a multiple of the longest prompt and response together, or leave it out.",
        )


def sampling_values_must_mean_something(options: RolloutOptions) -> None:
    if options.rollout_top_k == 0:
        raise OptionError("--rollout-top-k", 0, "it leaves no token to sample.", "Use -1 for all tokens, or 1 or more.")
    if "" in options.rollout_stop:
        raise OptionError(
            "--rollout-stop", "", "an empty text would end every response at once.", "Leave the empty text out."
        )


def reference_must_be_in_hf_format(ref_load: str | None) -> None:
    if ref_load is not None and (Path(ref_load) / "latest_checkpointed_iteration.txt").exists():
        raise OptionError(
            "--ref-load",
            ref_load,
            "it is a Megatron checkpoint; the reference is read from a folder in HF format.",
            "Convert it with `lockstep convert torch-dist-to-hf`.",
        )


def only_the_rollout_may_vary(options: dict[str, str | None]) -> None:
    """Paths in which `{rollout_id}` is filled in, by flag."""
    for flag, template in options.items():
        try:
            (template or "").format(rollout_id=0)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise OptionError(
                flag,
                template,
                f"only {{rollout_id}} can be filled in ({type(error).__name__}: {error}).",
                "Write {{ and }} for braces that belong to the name.",
            ) from error


def check_training(config: Config) -> None:
    """What `lockstep train` needs beyond a consistent config.

    Raises:
        OptionError: something is missing, or nothing could be learnt.
    """
    from lockstep.rewards.registry import check_reward_options

    debug, rollout, algorithm = config.debug, config.rollout, config.algorithm
    learns_from_rewards = algorithm.loss_type == "policy_loss"
    if debug.debug_train_only and debug.load_debug_rollout_data is None and learns_from_rewards:
        raise OptionError(
            "--debug-train-only",
            True,
            "there is nothing to train on.",
            "Give --load-debug-rollout-data with the files that --save-debug-rollout-data wrote.",
        )
    check_engine(config)
    check_reward_options(config.args())
    default_source = type(config.data).model_fields["data_source_path"].default
    reads_a_file = our_path(config.data.data_source_path) == default_source
    if config.data.prompt_data is None and reads_a_file and debug.load_debug_rollout_data is None:
        raise OptionError(
            "--prompt-data", None, "training needs prompts.", "Give a .jsonl or .parquet file of prompts."
        )
    if rollout.num_rollout is None and rollout.num_epoch is None:
        raise OptionError("--num-rollout", None, "the length of the run is open.", "Give --num-rollout or --num-epoch.")
    learns_from_groups = learns_from_rewards and not debug.debug_rollout_only
    if learns_from_groups and rollout.n_samples_per_prompt == 1 and not algorithm.disable_rewards_normalization:
        raise OptionError(
            "--n-samples-per-prompt",
            1,
            f"a group of one has advantage 0 with {algorithm.advantage_estimator} and teaches nothing.",
            "Use 2 or more.",
        )


def check_engine(config: Config) -> None:
    """What the engine needs, or cannot use.

    Raises:
        OptionError: naming what works.
    """
    cluster, sglang, rollout = config.cluster, config.sglang, config.rollout
    if rollout.rollout_engine == "embedded":
        _needs_servers("--rollout-num-gpus", cluster.rollout_num_gpus)
        _needs_servers("--rollout-external-engine-addrs", " ".join(sglang.rollout_external_engine_addrs))
        return
    if not sglang.sglang_python and not sglang.rollout_external_engine_addrs:
        raise OptionError(
            "--sglang-python",
            None,
            "servers have to be started.",
            "Give the Python of the environment that SGLang is installed in, or --rollout-external-engine-addrs.",
        )
    num_gpus = cluster.rollout_num_gpus or cluster.actor_num_gpus_per_node
    if not sglang.rollout_external_engine_addrs and num_gpus % cluster.rollout_num_gpus_per_engine:
        raise OptionError(
            "--rollout-num-gpus-per-engine",
            cluster.rollout_num_gpus_per_engine,
            f"it does not divide the {num_gpus} GPUs of the servers.",
            f"Use {_nearest_divisor(num_gpus, cluster.rollout_num_gpus_per_engine)}.",
        )
    if rollout.rollout_top_p < 1 or rollout.rollout_top_k > 0:
        cuts = rollout.rollout_top_p < 1
        raise OptionError(
            "--rollout-top-p" if cuts else "--rollout-top-k",
            rollout.rollout_top_p if cuts else rollout.rollout_top_k,
            "SGLang does not say which tokens it chose from, so the trainer could not renormalise over them.",
            "Leave it out, or sample with --rollout-engine embedded.",
        )
    transport = config.weight_sync.update_weight_transport
    if cluster.actor_num_gpus_per_node > 1 and transport in ("nccl", "tensor"):
        raise OptionError(
            "--update-weight-transport",
            transport,
            "weights that are divided over processes go to servers by disk.",
            "Use disk, or leave it out.",
        )


def _needs_servers(flag: str, value: object) -> None:
    if value:
        raise OptionError(
            flag,
            value,
            "the embedded engine samples on the trainer's own parameters, where they are.",
            "Leave it out, or use --rollout-engine sglang.",
        )


def check_evaluation(config: Config) -> None:
    """What `lockstep eval` needs beyond a consistent config.

    Raises:
        OptionError: there is no data set.
    """
    check_engine(config)
    if not config.eval.eval_prompt_data and config.eval.eval_config is None:
        raise OptionError(
            "--eval-prompt-data", None, "there is no data set to evaluate on.", "Give pairs of name and path."
        )
