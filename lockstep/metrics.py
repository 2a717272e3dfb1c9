"""Every metric of a run, declared once, and the pure functions that compute the ones about samples.

Names and meanings are slime's unless `ours` says otherwise. A name may hold one closed choice (`{mean,median,max,min}`)
or one free part (`{reason}`). `docs/metrics.md` is this module printed: `python -m lockstep.metrics > docs/metrics.md`.
"""

from __future__ import annotations

import math
import re
import statistics
import zlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any, Literal

from lockstep.types import Group, Sample

REPETITION_WINDOW = 10_000
"""Characters at the end of a response that are looked at for repetition; shorter responses never count, as in slime."""
REPETITION_COMPRESSION = 10
"""A window that zlib shrinks by more than this factor counts as repetition, as in slime."""


@dataclass(frozen=True)
class Metric:
    """One line of the table: what a name means, in which unit, and which direction is good (if one is)."""

    name: str
    unit: str
    meaning: str
    better: Literal["up", "down"] | None = None
    ours: bool = False
    """True when slime has no metric of this name."""

    @property
    def pattern(self) -> re.Pattern[str]:
        return _pattern(self.name)


def _ours(name: str, unit: str, meaning: str, better: Literal["up", "down"] | None = None) -> Metric:
    return Metric(name, unit, meaning, better, ours=True)


TRAIN = (
    Metric("train/loss", "nat", "What was minimised: policy loss plus its KL and entropy terms, or the SFT loss."),
    Metric("train/pg_loss", "nat", "Clipped policy-gradient loss alone. Its level says little; a jump says much."),
    Metric("train/entropy_loss", "nat", "Mean entropy of the policy per token. Falling to 0 means exploration ended."),
    Metric("train/pg_clipfrac", "fraction", "Tokens whose importance ratio was clipped."),
    Metric("train/ppo_kl", "nat", "k1 estimate of KL(old policy, policy): how far this rollout's updates moved it."),
    Metric(
        "train/kl_loss", "nat", "KL to the reference model per token, by the chosen estimator, before its coefficient."
    ),
    Metric("train/grad_norm", "1", "Norm of the whole gradient before clipping."),
    Metric("train/lr-pg_{group}", "1", "Learning rate of an optimizer parameter group."),
    Metric("train/global_batch_size", "samples", "Samples in this optimizer step."),
    Metric("train/step", "steps", "Optimizer steps since the run began."),
    Metric(
        "train/train_rollout_logprob_abs_diff",
        "nat",
        "Mean over tokens of the absolute difference of trainer's and sampler's log-prob under the same weights.",
        "down",
    ),
    _ours(
        "train/train_rollout_logprob_abs_diff_max", "nat", "The largest of these differences over all tokens.", "down"
    ),
    _ours(
        "train/routing_flips",
        "tokens",
        "Tokens predicted after the sampler's and the trainer's experts differed somewhere in the sample (near-ties).",
        "down",
    ),
    _ours(
        "train/logprob_diff_unexplained",
        "tokens",
        "Tokens whose log-prob differs by more than 1e-4 without such a difference of experts: 0 in fp32.",
        "down",
    ),
    _ours("train/tokens", "tokens", "Tokens of prompts and responses in this rollout's training."),
    Metric("train/ois", "1", "Mean importance ratio exp(policy - old log-prob)."),
    Metric("train/tis", "1", "Mean importance weight exp(old - rollout log-prob), before truncation."),
    Metric("train/tis_clipfrac", "fraction", "Tokens whose importance weight was truncated.", "down"),
    Metric("train/tis_abs", "1", "Mean distance of the importance weight from 1.", "down"),
    _ours("train/skipped_steps", "steps", "Optimizer steps left out because the gradient was not finite.", "down"),
)

ROLLOUT = (
    Metric("rollout/step", "steps", "The rollout's id."),
    Metric("rollout/raw_reward", "reward", "Mean reward as the reward function gave it.", "up"),
    Metric("rollout/rewards", "reward", "Mean reward after normalisation within groups, as the loss sees it."),
    Metric("rollout/response_len/{mean,median,max,min}", "tokens", "Response tokens that the loss sees, per sample."),
    Metric("rollout/truncated_ratio", "fraction", "Samples that ran into the length limit.", "down"),
    Metric(
        "rollout/repetition_frac",
        "fraction",
        "Long responses whose end repeats itself (it compresses over 10 times).",
        "down",
    ),
    Metric(
        "rollout/zero_std/count_{reward}",
        "groups",
        "Groups whose members all got this reward (rounded to 0.1); they teach nothing.",
        "down",
    ),
    Metric(
        "rollout/error_cat/{category}",
        "fraction",
        "Samples whose reward names this category (`--log-reward-category`).",
    ),
    Metric(
        "rollout/log_probs",
        "nat",
        "Log-prob of the sampled tokens by the trainer before the update; mean of each sample's mean.",
    ),
    Metric("rollout/ref_log_probs", "nat", "The same by the reference model."),
    Metric("rollout/rollout_log_probs", "nat", "The same by the sampler."),
    Metric("rollout/advantages", "1", "Mean advantage: mean of each sample's mean over its loss tokens."),
    Metric("rollout/returns", "1", "Mean return, averaged likewise."),
    Metric("rollout/total_lengths", "tokens", "Mean length of prompt and response together."),
    Metric(
        "rollout/prefix_cache_hit_rate",
        "fraction",
        "Tokens given to the engine, in all turns, that were not computed again.",
        "up",
    ),
    Metric(
        "rollout/avg_cached_tokens_per_sample",
        "tokens",
        "Tokens per sample, in all turns, taken from the prefix cache.",
        "up",
    ),
    _ours(
        "rollout/policy_version_{min,max}", "steps", "Oldest and newest weights that sampled tokens of this rollout."
    ),
    _ours("rollout/staleness_mean", "rollouts", "Rollouts trained on between a token's weights and this step's; mean."),
    _ours("rollout/staleness_max", "rollouts", "The largest of them: `--max-staleness` bounds it."),
    Metric("rollout/top_p_kept_vocab_per_token", "tokens", "Mean size of the nucleus that top-p kept."),
    Metric(
        "rollout/dynamic_filter/drop_{reason}",
        "groups",
        "Groups that the dynamic sampling filter dropped for this reason.",
    ),
    Metric("rollout/correct_response_lengths", "tokens", "Mean response length of samples with reward 1."),
    Metric(
        "rollout/correct_length/{p25,p50,p75,p100}",
        "fraction",
        "Of these samples, those whose length lies in this quarter of `--rollout-max-response-len` (p100: or above).",
    ),
    Metric(
        "rollout/correct_entropy",
        "nat",
        "Minus their log-prob by the trainer before the update; mean of each sample's mean.",
    ),
    _ours("rollout/samples", "samples", "Samples handed to training."),
    _ours("rollout/response_tokens", "tokens", "Response tokens of all these samples."),
    _ours("rollout/reward_timeout", "samples", "Rewards that missed `--reward-timeout`.", "down"),
    _ours("rollout/reward_exception", "samples", "Rewards that raised.", "down"),
    _ours("rollout/reward_crash", "samples", "Rewards whose worker process died.", "down"),
    _ours("rollout/reward_invalid", "samples", "Rewards that were not a finite number.", "down"),
    _ours(
        "rollout/groups_dropped_too_small",
        "groups",
        "Groups left with fewer than two samples, so without an advantage.",
        "down",
    ),
    _ours("rollout/prompts_drawn", "prompts", "Prompts taken from the data source or the buffer."),
    _ours("rollout/prompts_trained", "prompts", "Prompts whose group was trained on."),
    _ours("rollout/prompts_filtered", "prompts", "Prompts whose group a filter dropped."),
    _ours("rollout/prompts_failed", "prompts", "Prompts whose group was lost to failures.", "down"),
    _ours("rollout/prompts_deferred", "prompts", "Prompts put back into the buffer for a later rollout."),
    _ours("rollout/samples_deferred", "samples", "Samples among them that were begun (`--partial-rollout`)."),
    _ours("rollout/samples_continued", "samples", "Samples that an earlier rollout has begun (`--partial-rollout`)."),
    _ours(
        "rollout/overlong_prompts", "prompts", "Prompts left out so far because they exceed the length limit.", "down"
    ),
    _ours("rollout/malformed_rows", "rows", "Rows left out so far under `--skip-malformed-rows`.", "down"),
)

PERF = (
    Metric("perf/step_time", "s", "The whole step: `perf/train_wait_time` + `perf/train_time`.", "down"),
    Metric(
        "perf/train_wait_time", "s", "What the trainer waited between two trainings: rollout, eval, saving.", "down"
    ),
    Metric("perf/wait_time_ratio", "fraction", "`perf/train_wait_time` over `perf/step_time`.", "down"),
    Metric("perf/rollout_time", "s", "Sampling and rewards, from the first prompt to the last reward.", "down"),
    _ours(
        "perf/rollout_wait_time",
        "s",
        "What training waited for a rollout that was sampled beside it (`--schedule one-step-off` and `async`).",
        "down",
    ),
    _ours("perf/rollout_started_at", "s", "When this rollout began, in seconds since the run did."),
    _ours("perf/rollout_ended_at", "s", "When it had its last reward."),
    _ours("perf/train_started_at", "s", "When training on it began."),
    _ours("perf/train_ended_at", "s", "When training on it had ended; new weights reach the engine after it."),
    Metric("perf/update_weights_time", "s", "Until the engine could sample with the newest weights.", "down"),
    Metric("perf/train_time", "s", "All of training: data, log-probs, updates.", "down"),
    Metric(
        "perf/log_probs_time",
        "s",
        "Forward pass for the old policy's log-probs (0 when it is the training forward).",
        "down",
    ),
    Metric("perf/ref_log_probs_time", "s", "Forward pass of the reference model.", "down"),
    Metric("perf/actor_train_time", "s", "Forward, backward and optimizer.", "down"),
    _ours("perf/eval_time", "s", "Evaluation on held-out prompts.", "down"),
    Metric("perf/save_model_time", "s", "Writing the checkpoint (of the step before).", "down"),
    Metric(
        "perf/tokens_per_gpu_per_sec",
        "tokens/s",
        "Response tokens per second of rollout, per GPU (per machine on a CPU).",
        "up",
    ),
    Metric(
        "perf/effective_tokens_per_gpu_per_sec", "tokens/s", "The same, counting only tokens that the loss sees.", "up"
    ),
    Metric(
        "perf/longest_sample_tokens_per_sec",
        "tokens/s",
        "Length of the longest response over the time of the rollout.",
        "up",
    ),
    Metric(
        "perf/non_generation_time/{mean,median,max,min}",
        "s",
        "Time a sample spent in tools, not in the engine.",
        "down",
    ),
    Metric("perf/actor_train_tok_per_s", "tokens/s", "Tokens trained on per second of `perf/actor_train_time`.", "up"),
    *(
        _ours(f"perf/memory_{kind}/{{load,rollout,log_probs,train,save}}", "GiB", meaning)
        for kind, meaning in {
            "gpu": "Most memory that tensors took on the GPU in this phase.",
            "gpu_predicted": "The same by the plan: see [memory.md](memory.md).",
            "host": "Most memory of the machine that the run's processes took in this phase.",
            "host_predicted": "The same by the plan.",
        }.items()
    ),
)

EVAL = (
    Metric("eval/step", "steps", "The rollout after which the evaluation ran (-1: before training)."),
    Metric("eval/{name}", "reward", "Mean reward on this held-out set: accuracy when rewards are 0 and 1.", "up"),
    Metric("eval/{name}-truncated_ratio", "fraction", "Responses that ran into the length limit.", "down"),
    Metric("eval/{name}-pass@{k}", "fraction", "Chance that one of k responses has reward 1 (`--log-passrate`).", "up"),
    Metric("eval/{name}/response_len/{mean,median,max,min}", "tokens", "Response length on this set."),
    Metric("eval/{name}/truncated_ratio", "fraction", "Responses that ran into the length limit.", "down"),
    Metric("eval/{name}/repetition_frac", "fraction", "Long responses whose end repeats itself.", "down"),
    Metric("eval/{name}/zero_std/count_{reward}", "groups", "Prompts whose responses all got this reward."),
    Metric("eval/{name}/error_cat/{category}", "fraction", "Samples whose reward names this category."),
    Metric("passrate/pass@{k}", "fraction", "`eval/{name}-pass@{k}`, on the training prompts of this rollout.", "up"),
)

MULTI_TURN = (
    Metric(
        "multi_turn/raw_response_length/response_length_{mean,max,min}",
        "tokens",
        "Response tokens per sample, those of tools included.",
    ),
    Metric(
        "multi_turn/raw_response_length/response_length_clip_ratio",
        "fraction",
        "Samples with at least `--rollout-max-response-len` such tokens.",
        "down",
    ),
    Metric(
        "multi_turn/wo_obs_response_length/response_length_{mean,max,min}",
        "tokens",
        "Response tokens per sample that the loss sees: those of tools left out.",
    ),
    Metric(
        "multi_turn/multi_turn_metric/round_number_{mean,max,min}",
        "rounds",
        "`metadata['round_number']`, which a generate function sets.",
    ),
)

METRICS = TRAIN + ROLLOUT + PERF + EVAL + MULTI_TURN


@cache
def _pattern(name: str) -> re.Pattern[str]:
    parts = re.split(r"\{(.+?)\}", name)
    literals, holes = parts[::2], parts[1::2]
    groups = [f"(?:{'|'.join(map(re.escape, hole.split(',')))})" if "," in hole else "[^/]+" for hole in holes]
    return re.compile("".join(chain(*zip(map(re.escape, literals), [*groups, ""], strict=True))))


@cache
def find(name: str) -> Metric | None:
    """The declaration that covers `name`: the one with the longest fixed text if several do."""
    matches = [metric for metric in METRICS if metric.pattern.fullmatch(name)]
    return max(matches, key=lambda metric: len(re.sub(r"\{.+?\}", "", metric.name)), default=None)


def check(names: Iterable[str]) -> None:
    """Assert that each of our own metric names is declared. Names that a user's hook adds are not checked."""
    undeclared = sorted(name for name in names if find(name) is None)
    assert not undeclared, f"undeclared metrics {undeclared}: add them to lockstep/metrics.py"


def _statistics(prefix: str, values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {
        f"{prefix}/mean": statistics.fmean(values),
        f"{prefix}/median": float(statistics.median(values)),
        f"{prefix}/max": float(max(values)),
        f"{prefix}/min": float(min(values)),
    }


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0


def token_mean_per_sample(values: Iterable[Sequence[float]], loss_masks: Iterable[Sequence[int]]) -> float:
    """The mean over samples of each sample's mean over its loss tokens; samples without loss tokens are left out."""
    means = []
    for row, mask in zip(values, loss_masks, strict=True):
        kept = [value for value, keep in zip(row, mask, strict=True) if keep]
        if kept:
            means.append(_mean(kept))
    return _mean(means)


def has_repetition(text: str) -> bool:
    """Whether the last 10,000 characters of a longer text shrink more than tenfold under zlib."""
    window = text[-REPETITION_WINDOW:].encode()
    return len(text) > REPETITION_WINDOW and len(window) > REPETITION_COMPRESSION * len(zlib.compress(window, 9))


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The chance that k of `num_samples` responses, drawn without replacement, hold at least one correct one.

    Source: the unbiased estimator of arXiv:2107.03374, equation 1.
    """
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(f"pass@{k} of {num_correct} correct in {num_samples} samples is not defined.")
    chance_of_none = 1.0
    for drawn in range(k):
        chance_of_none *= max(num_samples - num_correct - drawn, 0) / (num_samples - drawn)
    return 1.0 - chance_of_none


def pass_rates(rewards: Sequence[float | None], group_ids: Sequence[Hashable]) -> dict[str, float]:
    """`pass@k` for k = 1, 2, 4, ... up to the largest group, each averaged over the groups with at least k samples.

    A reward of exactly 1 is correct, as in slime. Empty when no group has two samples.
    """
    groups: dict[Hashable, list[float | None]] = defaultdict(list)
    for reward, group_id in zip(rewards, group_ids, strict=True):
        groups[group_id].append(reward)
    sizes_and_correct = [(len(group), sum(reward == 1 for reward in group)) for group in groups.values()]
    largest = max((size for size, _ in sizes_and_correct), default=0)
    if largest < 2:
        return {}
    ks = [2**power for power in range(largest.bit_length())]
    return {f"pass@{k}": _mean([pass_at_k(n, c, k) for n, c in sizes_and_correct if n >= k]) for k in ks}


def _zero_std_counts(rewards: Sequence[float | None], group_ids: Sequence[Hashable]) -> dict[str, float]:
    groups: dict[Hashable, list[float]] = defaultdict(list)
    for reward, group_id in zip(rewards, group_ids, strict=True):
        if reward is not None:
            groups[group_id].append(reward)
    flat = Counter(str(round(group[0], 1)) for group in groups.values() if len(set(group)) == 1)
    return {f"zero_std/count_{reward}": float(count) for reward, count in sorted(flat.items())}


def _group_ids(samples: Sequence[Sample]) -> list[Hashable]:
    """Each sample's `group_index`; a sample without one is a group of its own."""
    return [
        sample.group_index if sample.group_index is not None else ("alone", position)
        for position, sample in enumerate(samples)
    ]


def _sample_metrics(samples: Sequence[Sample], rewards: Sequence[float | None], args: Any) -> dict[str, float]:
    """What training and evaluation report alike about samples, without a prefix."""
    metrics = _statistics("response_len", [sample.effective_response_length for sample in samples])
    metrics["truncated_ratio"] = _mean([sample.status is Sample.Status.TRUNCATED for sample in samples])
    metrics["repetition_frac"] = _mean([has_repetition(sample.response) for sample in samples])
    if args.advantage_estimator != "ppo":
        metrics |= _zero_std_counts(rewards, _group_ids(samples))
    if args.log_reward_category:
        categories = Counter(
            str(sample.reward[args.log_reward_category]) for sample in samples if isinstance(sample.reward, dict)
        )
        metrics |= {f"error_cat/{name}": count / len(samples) for name, count in sorted(categories.items())}
    return metrics


def _mean_nucleus(samples: Sequence[Sample]) -> dict[str, float]:
    recorded = [sample.rollout_top_p_token_offsets for sample in samples if sample.rollout_top_p_token_offsets]
    num_tokens = sum(len(offsets) - 1 for offsets in recorded)
    return {"top_p_kept_vocab_per_token": sum(offsets[-1] for offsets in recorded) / num_tokens} if num_tokens else {}


def staleness_metrics(samples: Sequence[Sample], version: int, steps_per_rollout: int) -> dict[str, float]:
    """Which weights sampled the tokens that a step trains on; nothing where no engine says it.

    Args:
        version: of the weights that are trained, which count optimizer steps.
    """
    counts = Counter(int(v) for sample in samples for v in sample.weight_versions if v.isdigit())
    if not counts:
        return {}
    behind = sum((version - v) * count for v, count in counts.items())
    return {
        "rollout/policy_version_min": float(min(counts)),
        "rollout/policy_version_max": float(max(counts)),
        "rollout/staleness_mean": behind / counts.total() / steps_per_rollout,
        "rollout/staleness_max": (version - min(counts)) / steps_per_rollout,
    }


def rollout_metrics(groups: Sequence[Group], args: Any) -> dict[str, float]:
    """The `rollout/` metrics that follow from finished samples alone (and `passrate/`, `multi_turn/` when asked for).

    Args:
        args: `config.args()`; read are reward_key, advantage_estimator, log_passrate, log_reward_category,
            log_multi_turn and rollout_max_response_len.
    """
    samples = [sample for group in groups for sample in group]
    rewards = [None if sample.reward is None else sample.get_reward_value(args) for sample in samples]
    with_log_probs = [sample for sample in samples if sample.rollout_log_probs]
    metrics = _sample_metrics(samples, rewards, args) | {
        "samples": float(len(samples)),
        "response_tokens": float(sum(sample.response_length for sample in samples)),
        "total_lengths": _mean([len(sample.tokens) for sample in samples]),
        **_mean_nucleus(samples),
    }
    if given := [reward for reward in rewards if reward is not None]:
        metrics["raw_reward"] = _mean(given)
    if with_log_probs:
        metrics["rollout_log_probs"] = token_mean_per_sample(
            [sample.rollout_log_probs or [] for sample in with_log_probs],
            [sample.loss_mask or [1] * sample.response_length for sample in with_log_probs],
        )
    result = {f"rollout/{name}": value for name, value in metrics.items()}
    if args.log_passrate:
        result |= {f"passrate/{name}": rate for name, rate in pass_rates(rewards, _group_ids(samples)).items()}
    if args.log_multi_turn:
        result |= multi_turn_metrics(samples, args.rollout_max_response_len)
    return result


def multi_turn_metrics(samples: Sequence[Sample], rollout_max_response_len: int) -> dict[str, float]:
    """The `multi_turn/` metrics of `--log-multi-turn`."""
    raw = [sample.response_length for sample in samples]
    families = {
        "raw_response_length/response_length": raw,
        "wo_obs_response_length/response_length": [sample.effective_response_length for sample in samples],
        "multi_turn_metric/round_number": [s.metadata["round_number"] for s in samples if "round_number" in s.metadata],
    }
    metrics = {
        f"multi_turn/{family}_{name}": float(function(values))
        for family, values in families.items()
        if values
        for name, function in (("mean", statistics.fmean), ("max", max), ("min", min))
    }
    clipped = _mean([length >= rollout_max_response_len for length in raw])
    return metrics | {"multi_turn/raw_response_length/response_length_clip_ratio": clipped}


def correct_sample_metrics(
    samples: Sequence[Sample], log_probs: Sequence[Sequence[float]], args: Any
) -> dict[str, float]:
    """The `rollout/correct_*` metrics of `--log-correct-samples`; a reward of exactly 1 is correct, as in slime.

    Args:
        log_probs: of each sample's response tokens, by the trainer.
        args: `config.args()`; read are reward_key and rollout_max_response_len.
    """
    correct = [(s, row) for s, row in zip(samples, log_probs, strict=True) if s.get_reward_value(args) == 1]
    if not correct:
        return {}
    lengths = [sample.response_length for sample, _ in correct]
    quarters = Counter(min(4, max(1, math.ceil(4 * n / args.rollout_max_response_len))) for n in lengths)
    masks = [sample.loss_mask or [1] * sample.response_length for sample, _ in correct]
    return {
        "rollout/correct_response_lengths": _mean(lengths),
        "rollout/correct_entropy": -token_mean_per_sample([row for _, row in correct], masks),
        **{f"rollout/correct_length/p{25 * quarter}": quarters[quarter] / len(lengths) for quarter in (1, 2, 3, 4)},
    }


def rollout_perf_metrics(groups: Sequence[Group], rollout_time: float, num_gpus: int) -> dict[str, float]:
    """The `perf/` metrics that follow from the samples and the seconds it took to make them."""
    samples = [sample for group in groups for sample in group]
    lengths = [sample.response_length for sample in samples]
    effective_tokens = sum(sample.effective_response_length for sample in samples)
    metrics = {
        "perf/rollout_time": rollout_time,
        "perf/tokens_per_gpu_per_sec": sum(lengths) / rollout_time / num_gpus,
        "perf/effective_tokens_per_gpu_per_sec": effective_tokens / rollout_time / num_gpus,
        "perf/longest_sample_tokens_per_sec": max(lengths, default=0) / rollout_time,
    }
    non_generation_times = [sample.non_generation_time for sample in samples]
    if any(non_generation_times):
        metrics |= _statistics("perf/non_generation_time", non_generation_times)
    return metrics


def eval_metrics(data: dict[str, dict[str, Any]], args: Any) -> dict[str, float]:
    """The `eval/` metrics of every held-out set.

    Args:
        data: as `RolloutFnEvalOutput.data`: per set "rewards" (scalars), and optionally "truncated" and "samples", in
            the same order. Without "samples" the prompts are taken to be runs of `args.n_samples_per_eval_prompt`.
        args: `config.args()`; read are advantage_estimator, log_passrate, log_reward_category and
            n_samples_per_eval_prompt.
    """
    metrics: dict[str, float] = {}
    for name, results in data.items():
        rewards: list[float] = results["rewards"]
        samples: list[Sample] | None = results.get("samples")
        metrics[f"eval/{name}"] = _mean(rewards)
        if samples:
            of_samples = _sample_metrics(samples, rewards, args)
            metrics |= {f"eval/{name}/{key}": value for key, value in of_samples.items()}
        if "truncated" in results:
            metrics[f"eval/{name}-truncated_ratio"] = _mean(results["truncated"])
        if args.log_passrate:
            by_position = [position // args.n_samples_per_eval_prompt for position in range(len(rewards))]
            rates = pass_rates(rewards, _group_ids(samples) if samples else by_position)
            metrics |= {f"eval/{name}-{key}": rate for key, rate in rates.items()}
    return metrics


def as_markdown() -> str:
    """The page docs/metrics.md."""
    sections = [
        ("train/", TRAIN),
        ("rollout/", ROLLOUT),
        ("perf/", PERF),
        ("eval/ and passrate/", EVAL),
        ("multi_turn/", MULTI_TURN),
    ]
    lines = [
        "# Metrics",
        "",
        "Everything that a run writes to `metrics.jsonl`, TensorBoard and wandb. Generated from `lockstep/metrics.py`:",
        "`python -m lockstep.metrics > docs/metrics.md`. ↑ and ↓ say which direction is good, where one is. Names with",
        "a star are Lockstep's own, all others are slime's. `{a,b}` is a choice, `{name}` a free part.",
    ]
    for title, metrics in sections:
        lines += ["", f"## {title}", "", "| name | unit | | meaning |", "|---|---|---|---|"]
        for metric in metrics:
            arrow = {"up": "↑", "down": "↓", None: ""}[metric.better]
            star = r"\*" if metric.ours else ""
            lines.append(f"| `{metric.name}`{star} | {metric.unit} | {arrow} | {metric.meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(as_markdown(), end="")
