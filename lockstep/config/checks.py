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


def staleness_must_fit_the_schedule(options: RolloutOptions) -> None:
    least, most = {"sync": (0, 0), "one-step-off": (1, 1), "async": (1, None)}[options.schedule]
    bound = options.staleness_bound
    if bound < least or (most is not None and bound > most):
        raise OptionError(
            "--max-staleness",
            bound,
            f"--schedule {options.schedule} trains on rollouts that are {least} behind"
            + ("." if most is not None else " or more."),
            "Leave it out, or use --schedule async with 1 or more.",
        )


def over_sampling_must_cover_the_batch(options: RolloutOptions) -> None:
    if options.over_sampling_batch_size < options.rollout_batch_size:
        raise OptionError(
            "--over-sampling-batch-size",
            options.over_sampling_batch_size,
            f"it is below --rollout-batch-size {options.rollout_batch_size}.",
            f"Use {options.rollout_batch_size} or more, or leave it out.",
        )


def partial_rollouts_must_fit(options: RolloutOptions) -> None:
    if options.partial_rollout and options.schedule != "sync":
        raise OptionError(
            "--partial-rollout",
            True,
            f"with --schedule {options.schedule} a continued sample could be older than --max-staleness allows, and "
            "rollouts that overlap would interrupt each other.",
            "Use --schedule sync; or leave it out, as those schedules do not wait for the longest response either.",
        )
    if options.mask_offpolicy_in_partial_rollout and not options.partial_rollout:
        raise OptionError(
            "--mask-offpolicy-in-partial-rollout",
            True,
            "without --partial-rollout every sample is written in one rollout, and nothing of it is masked.",
            "Give --partial-rollout too, or leave it out.",
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


def dummies_stay_here(config: Config) -> None:
    """Random weights are for looking at a run, in our own processes."""
    if config.model.load_format != "dummy":
        return
    if config.rollout.rollout_engine == "sglang":
        raise OptionError(
            "--load-format",
            "dummy",
            "SGLang's servers begin with the weights of the folder, which would be another model.",
            "Leave out --rollout-engine sglang.",
        )
    if config.checkpoint.save_hf is not None:
        raise OptionError(
            "--save-hf", config.checkpoint.save_hf, "the weights of --load-format dummy are no model.", "Leave it out."
        )


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
    dummies_stay_here(config)
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
    if config.algorithm.true_on_policy:
        _true_on_policy_needs_one_process(config)
    if rollout.schedule != "sync" and not (cluster.rollout_num_gpus or sglang.rollout_external_engine_addrs):
        raise OptionError(
            "--schedule",
            rollout.schedule,
            "one set of weights cannot sample and be trained at the same time.",
            "Give sampling GPUs of its own with --rollout-num-gpus, or use --schedule sync.",
        )
    if rollout.rollout_engine == "embedded":
        if cluster.rollout_num_gpus and cluster.rollout_num_gpus_per_engine > 1:
            raise OptionError(
                "--rollout-num-gpus-per-engine",
                cluster.rollout_num_gpus_per_engine,
                "a copy of the model that the embedded engine samples with lies on one GPU.",
                "Use 1, or --rollout-engine sglang.",
            )
        _needs_servers("--rollout-external-engine-addrs", " ".join(sglang.rollout_external_engine_addrs))
        return
    if not sglang.sglang_python and not sglang.rollout_external_engine_addrs:
        raise OptionError(
            "--sglang-python",
            None,
            "servers have to be started.",
            "Give the Python of the environment that SGLang is installed in, or --rollout-external-engine-addrs.",
        )
    num_gpus = cluster.rollout_num_gpus or cluster.num_ranks
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


def _true_on_policy_needs_one_process(config: Config) -> None:
    """Only there do sampler and trainer run the same layers over the same whole weights."""
    cluster, sglang, engine = config.cluster, config.sglang, config.rollout.rollout_engine
    refused = [
        ("--rollout-engine", engine, engine != "embedded", "its sampler is another program with kernels of its own."),
        (
            "--rollout-external-engine-addrs",
            " ".join(sglang.rollout_external_engine_addrs),
            bool(sglang.rollout_external_engine_addrs),
            "servers have kernels of their own.",
        ),
        (
            "--rollout-num-gpus",
            cluster.rollout_num_gpus,
            bool(cluster.rollout_num_gpus),
            "copies of the weights on other GPUs do not compute exactly yet.",
        ),
        (
            "--actor-num-gpus-per-node",
            cluster.num_ranks,
            cluster.num_ranks > 1,
            "sums over tensor-, context-, expert- or data-parallel ranks are not shown to keep every bit.",
        ),
        ("--cluster", "ray", cluster.uses_ray, "ranks on other machines do not compute exactly yet."),
    ]
    for flag, value, is_refused, reason in refused:
        if is_refused:
            raise OptionError(
                flag,
                value,
                f"with --true-on-policy, {reason}",
                "Leave out --true-on-policy, or train in one process that samples with --rollout-engine embedded.",
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
