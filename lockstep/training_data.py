"""From scored groups to what the trainer gets: advantages, loss weights, and the split into optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

from lockstep.algorithms import AdvantageEstimator, sample_loss_weights, whiten_advantages
from lockstep.errors import RolloutError
from lockstep.trainer.batch import TrainSample
from lockstep.types import Group, Sample


@dataclass(frozen=True)
class TrainingData:
    """The samples of one rollout, flat and in order, split into the global batches of its optimizer steps."""

    samples: list[Sample]
    train_samples: list[TrainSample]
    steps: list[list[TrainSample]]
    """The same objects as `train_samples`."""


def make_training_data(
    groups: Sequence[Group],
    args: Any,
    advantage_estimator: AdvantageEstimator | None,
    reward_post_process: Callable[[Any, list[Sample]], tuple[list[float], list[float]]] | None = None,
    *,
    num_steps: int,
) -> TrainingData:
    """Everything that is decided once over the whole rollout.

    Args:
        advantage_estimator: None for SFT, whose loss has no advantages.
        reward_post_process: the user's `(args, samples) -> (raw, normalised)` in place of the estimator.
        num_steps: optimizer steps; rollouts (samples that share a rollout_id) are never split between two.
    """
    samples = [sample for group in groups for sample in group]
    needs_log_probs = args.use_rollout_logprobs or args.use_tis or args.get_mismatch_metrics
    for sample in samples:
        _check(sample)
        if needs_log_probs and sample.rollout_log_probs is None:
            raise RolloutError(
                f"sample {sample.index}",
                None,
                "it has no rollout_log_probs, which the loss of these options reads.",
                "Keep them in the generate function, or leave out --use-tis, --use-rollout-logprobs and "
                "--get-mismatch-metrics.",
            )
    train_samples = [_train_sample(sample) for sample in samples]
    if reward_post_process is not None:
        advantages = _post_processed(reward_post_process(args, samples), len(samples))
    elif advantage_estimator is not None:
        rewards = torch.tensor([float(sample.get_reward_value(args)) for sample in samples], dtype=torch.float32)
        group_ids = torch.tensor([i for i, group in enumerate(groups) for _ in group])
        advantages = _estimated(advantage_estimator, rewards, group_ids)
    else:
        advantages = torch.zeros(len(samples))
    if args.normalize_advantages:
        advantages = _whitened(advantages, samples, train_samples)
    for train_sample, advantage in zip(train_samples, advantages.tolist(), strict=True):
        train_sample.advantage = advantage
    rollout_ids = _rollout_ids(samples)
    steps = []
    for members in _split_by_rollout(rollout_ids, num_steps):
        weights = sample_loss_weights(
            [sum(train_samples[i].loss_mask) for i in members],
            [rollout_ids[i] for i in members],
            removed=[samples[i].remove_sample for i in members],
            calculate_per_token_loss=args.calculate_per_token_loss,
        )
        for i, weight in zip(members, weights, strict=True):
            train_samples[i].loss_weight = weight
        steps.append([train_samples[i] for i in members])
    return TrainingData(samples, train_samples, steps)


def _estimated(advantage_estimator: AdvantageEstimator, rewards: Tensor, group_ids: Tensor) -> Tensor:
    try:
        return advantage_estimator(rewards, group_ids)
    except ValueError as error:
        raise RolloutError(
            "rollout",
            f"{len(rewards)} samples",
            str(error),
            "Mend the rollout function or the stored rollout; the built-in rollout drops and counts such groups.",
        ) from error


def _post_processed(answer: Any, num_samples: int) -> Tensor:
    """The normalised rewards of what `--custom-reward-post-process-path` returned."""
    try:
        _, normalised = answer
        advantages = torch.tensor(normalised, dtype=torch.float32)
    except (TypeError, ValueError) as error:
        problem = f"it is not a pair of lists of numbers ({error})."
    else:
        if advantages.shape == (num_samples,) and advantages.isfinite().all():
            return advantages
        problem = f"its second list must hold {num_samples} finite numbers, one per sample."
    raise RolloutError(
        "--custom-reward-post-process-path", repr(answer)[:80], problem, "Return (raw rewards, normalised rewards)."
    )


def _rollout_ids(samples: list[Sample]) -> list[int]:
    """The rollout of each sample; one without an id is a rollout of its own, named by its index or its position."""
    names = [sample.index if sample.rollout_id is None else sample.rollout_id for sample in samples]
    return [-1 - position if name is None else name for position, name in enumerate(names)]


def _split_by_rollout(rollout_ids: list[int], num_steps: int) -> list[list[int]]:
    """Indices of each step's samples, rising: whole rollouts by their first samples, as evenly as they divide."""
    by_rollout: dict[int, list[int]] = {}
    for index, rollout_id in enumerate(rollout_ids):
        by_rollout.setdefault(rollout_id, []).append(index)
    rollouts = list(by_rollout.values())
    borders = [len(rollouts) * step // num_steps for step in range(num_steps + 1)]
    return [sorted(chain(*rollouts[begin:end])) for begin, end in pairwise(borders) if begin < end]


def _whitened(advantages: Tensor, samples: list[Sample], train_samples: list[TrainSample]) -> Tensor:
    """`--normalize-advantages`: over the tokens that the loss sees. Nothing changes when it sees none."""
    together = zip(samples, train_samples, strict=True)
    num_loss_tokens = torch.tensor([0 if s.remove_sample else sum(t.loss_mask) for s, t in together])
    return whiten_advantages(advantages, num_loss_tokens) if num_loss_tokens.any() else advantages


def _train_sample(sample: Sample) -> TrainSample:
    mask = sample.loss_mask if sample.loss_mask is not None else [1] * sample.response_length
    offsets = sample.rollout_top_p_token_offsets
    if offsets is not None:
        offsets = offsets + [offsets[-1]] * (sample.response_length + 1 - len(offsets))
    return TrainSample(
        tokens=sample.tokens,
        response_length=sample.response_length,
        loss_mask=mask,
        rollout_log_probs=sample.rollout_log_probs,
        kept_token_ids=sample.rollout_top_p_token_ids,
        kept_token_offsets=offsets,
        routed_experts=sample.rollout_routed_experts,
    )


def _check(sample: Sample) -> None:
    """Refuse what a custom generate function may have left inconsistent."""
    length = sample.response_length
    mask, log_probs, routes = sample.loss_mask, sample.rollout_log_probs, sample.rollout_routed_experts
    problem = _nucleus_problem(sample)
    if not 0 < length < len(sample.tokens):
        problem = f"it has {len(sample.tokens)} tokens, {length} of them response; both parts need at least one."
    elif mask is not None and len(mask) != length:
        problem = f"loss_mask has {len(mask)} entries for {length} response tokens."
    elif log_probs is not None and len(log_probs) != length:
        problem = f"rollout_log_probs has {len(log_probs)} entries for {length} response tokens."
    elif routes is not None and len(routes) >= len(sample.tokens):
        problem = f"rollout_routed_experts has {len(routes)} rows for {len(sample.tokens) - 1} predictions."
    if problem:
        raise RolloutError(
            f"sample {sample.index}",
            sample.status.value,
            problem,
            "Use Sample.append_response_tokens in custom generate functions: it keeps the lists in step.",
        )


def _nucleus_problem(sample: Sample) -> str | None:
    ids, borders = sample.rollout_top_p_token_ids, sample.rollout_top_p_token_offsets
    if ids is None and borders is None:
        return None
    if ids is None or borders is None:
        return "rollout_top_p_token_ids and rollout_top_p_token_offsets belong together, and one is missing."
    is_in_order = borders[:1] == [0] and borders[-1] == len(ids) and all(a <= b for a, b in pairwise(borders))
    if is_in_order and len(borders) <= sample.response_length + 1:
        return None
    return (
        f"rollout_top_p_token_offsets must rise from 0 to {len(ids)}, the kept tokens, with at most one border "
        f"more than the {sample.response_length} response tokens."
    )
