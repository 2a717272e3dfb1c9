"""The loss and its gradient are those of a naive loop over transformers' model, however the batch is cut up."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, VOCAB, hf_model, moe_config, relative_error, tiny_trainer, twin_of
from torch import Tensor
from transformers import PreTrainedModel

from lockstep.algorithms import Loss, SftLoss, make_advantage_estimator, make_policy_loss
from lockstep.trainer.batch import TrainSample
from lockstep.trainer.local import LocalTrainer
from lockstep.training_data import make_training_data
from lockstep.types import Sample

TEMPERATURE = 0.8
EPS_LOW, EPS_HIGH, KL_COEF, ENTROPY_COEF = 0.2, 0.28, 0.05, 0.01


def ragged_groups() -> list[list[Sample]]:
    """Groups of 2, 5 and 3; one sample is removed, one masked in part, two are branches of one rollout."""
    draw = random.Random(0)
    groups, number = [], 0
    for group, size in enumerate([2, 5, 3]):
        prompt = [draw.randrange(VOCAB) for _ in range(draw.randrange(3, 9))]
        samples = []
        for _ in range(size):
            length = draw.randrange(1, 15)
            samples.append(
                Sample(
                    group_index=group,
                    index=number,
                    rollout_id=number,
                    tokens=prompt + [draw.randrange(VOCAB) for _ in range(length)],
                    response_length=length,
                    reward=draw.random(),
                )
            )
            number += 1
        groups.append(samples)
    groups[1][2].remove_sample = True
    groups[1][4].rollout_id = groups[1][3].rollout_id
    long = max(groups[2], key=lambda s: s.response_length)
    long.loss_mask = [int(i % 3 != 1) for i in range(long.response_length)]
    return groups


def noise(sample: Sample, seed: int) -> Tensor:
    """Per token and per sample, so that ratios of both kinds move."""
    draw = torch.Generator().manual_seed(seed + 100 * (sample.index or 0))
    return 0.3 * torch.randn(sample.response_length, generator=draw) + 0.4 * torch.randn(1, generator=draw)


def train_samples(
    groups: list[list[Sample]], policy: LocalTrainer, *, per_token: bool, is_sft: bool
) -> list[TrainSample]:
    """Off policy by a random distance, so that some ratios are clipped; references differ too."""
    args = SimpleNamespace(
        calculate_per_token_loss=per_token,
        reward_key=None,
        normalize_advantages=False,
        use_tis=False,
        use_rollout_logprobs=False,
        get_mismatch_metrics=False,
    )
    data = make_training_data(groups, args, None if is_sft else make_advantage_estimator(), num_steps=1)
    current = policy.log_probs(data.train_samples)
    for sample, train_sample, result in zip(data.samples, data.train_samples, current, strict=True):
        train_sample.old_log_probs = result.log_probs + noise(sample, 1)
        train_sample.ref_log_probs = result.log_probs + noise(sample, 2)
    return data.train_samples


def naive_loss(
    model: PreTrainedModel, groups: list[list[Sample]], train: list[TrainSample], kind: str, *, per_token: bool
) -> Tensor:
    """Design decision 8 as loops: tokens, rollouts, batch."""
    samples = [sample for group in groups for sample in group]
    trained_tokens: dict[Any, int] = {}
    for sample in samples:
        mask = sample.loss_mask or [1] * sample.response_length
        trained_tokens.setdefault(sample.rollout_id, 0)
        trained_tokens[sample.rollout_id] += 0 if sample.remove_sample else sum(mask)
    total = torch.zeros(())
    for sample, fixed in zip(samples, train, strict=True):
        if sample.remove_sample:
            continue
        mask = torch.tensor(sample.loss_mask or [1] * sample.response_length).bool()
        if per_token:
            weight = 1 / sum(trained_tokens.values())
        else:
            weight = 1 / (trained_tokens[sample.rollout_id] * len(trained_tokens))
        logits = model(torch.tensor([sample.tokens])).logits[0, -sample.response_length - 1 : -1]
        log_softmax = (logits / (1.0 if kind == "sft" else TEMPERATURE)).log_softmax(-1)
        log_probs = log_softmax[torch.arange(sample.response_length), sample.tokens[-sample.response_length :]]
        if kind == "sft":
            total = total - weight * log_probs[mask].sum()
            continue
        group = [s.reward for s in groups[sample.group_index or 0]]
        rewards = torch.tensor(group, dtype=torch.float64)
        advantage = float((sample.reward - rewards.mean()) / (rewards.std(unbiased=True) + 1e-6))  # type: ignore[operator]
        log_ratio = log_probs - fixed.old_log_probs
        ratio = log_ratio[mask].mean().exp().expand(int(mask.sum())) if kind == "gspo" else log_ratio[mask].exp()
        policy = torch.maximum(-ratio * advantage, -ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH) * advantage)
        to_reference = (log_probs - fixed.ref_log_probs)[mask]
        kl = (torch.exp(-to_reference) - 1 + to_reference).clamp(-10, 10)
        entropy = -(log_softmax.exp() * log_softmax).sum(-1)[mask]
        total = total + weight * (policy + KL_COEF * kl - ENTROPY_COEF * entropy).sum()
    return total


LOSSES: dict[str, Callable[[], Loss]] = {
    name: lambda name=name: make_policy_loss(  # type: ignore[misc]
        name,
        eps_clip=EPS_LOW,
        eps_clip_high=EPS_HIGH,
        use_kl_loss=True,
        kl_loss_coef=KL_COEF,
        kl_loss_type="low_var_kl",
        entropy_coef=ENTROPY_COEF,
    )
    for name in ("grpo", "gspo")
} | {"sft": SftLoss}

CUTS: dict[str, dict[str, Any]] = {
    "all in one": {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 10_000},
    "packed small": {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 40},
    "one by one": {"micro_batch_size": 1},
    "three by three": {"micro_batch_size": 3},
    "small chunks of logits": {"micro_batch_size": 4, "log_probs_chunk_size": 5},
    "recomputed": {"micro_batch_size": 4, "recompute_granularity": "full"},
    "layer by layer": {"micro_batch_size": 3, "backward_order": "layer"},
}


def gradient_step(
    theirs: PreTrainedModel, kind: str, cut: dict[str, Any], *, per_token: bool, order: list[int] | None = None
) -> tuple[dict[str, float], dict[str, Tensor], list[TrainSample]]:
    """Metrics and gradients of one step; with beta1 = 0 the optimizer's first moment is the gradient itself."""
    trainer = tiny_trainer(
        twin_of(theirs),
        loss=LOSSES[kind](),
        temperature=1.0 if kind == "sft" else TEMPERATURE,
        batching=cut,
        lr=0.0,
        adam_beta1=0.0,
        clip_grad=0.0,
    )
    samples = train_samples(ragged_groups(), trainer, per_token=per_token, is_sft=kind == "sft")
    result = trainer.step([samples[i] for i in order] if order else samples)
    state = {name.removeprefix("exp_avg."): t for name, t in trainer.optimizer.named_state() if "exp_avg." in name}
    return result.metrics, state, samples


@pytest.mark.parametrize("per_token", [False, True], ids=["per rollout", "per token"])
@pytest.mark.parametrize("kind", LOSSES)
def test_the_loss_is_the_naive_loops_and_does_not_depend_on_how_the_batch_is_cut(kind: str, per_token: bool) -> None:
    theirs = hf_model(moe_config(0))
    metrics, gradients, samples = gradient_step(theirs, kind, CUTS["all in one"], per_token=per_token)

    wanted = naive_loss(theirs, ragged_groups(), samples, kind, per_token=per_token)
    wanted.backward()
    assert metrics["train/loss"] == pytest.approx(wanted.item(), rel=1e-5)
    if kind != "sft":
        assert 0 < metrics["train/pg_clipfrac"] < 1, "the case must clip some ratios and leave others"
    errors = {
        name: relative_error(gradients[name], p.grad) for name, p in theirs.named_parameters() if p.grad is not None
    }
    assert errors.keys() == gradients.keys()
    assert max(errors.values()) < 2e-5

    draw = random.Random(1)
    for name, cut in CUTS.items():
        order = draw.sample(range(len(samples)), len(samples))
        other, other_gradients, _ = gradient_step(theirs, kind, cut, per_token=per_token, order=order)
        for key in metrics:
            # Signed terms nearly cancel; 5e-7 is 1e-6 of their mean size, which is about a half.
            assert other[key] == pytest.approx(metrics[key], rel=1e-6, abs=5e-7), (name, key)
        worst = max(relative_error(other_gradients[n], g) for n, g in gradients.items())
        assert worst < 1e-5, name


@pytest.mark.parametrize("kind", LOSSES)
def test_recomputing_activations_changes_no_bit_of_the_gradient(kind: str) -> None:
    theirs = hf_model(moe_config(1))
    cut = CUTS["three by three"]
    _, kept, _ = gradient_step(theirs, kind, cut, per_token=False)
    _, recomputed, _ = gradient_step(theirs, kind, cut | {"recompute_granularity": "full"}, per_token=False)
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_finishing_layer_by_layer_gives_the_gradient_of_finishing_by_micro_batch(family: str, tied: bool) -> None:
    """Every layer runs the same operations on the same inputs; only sums over micro-batches are ordered alike too."""
    theirs = hf_model(CONFIGS[family](2, tie_word_embeddings=tied))
    cut = CUTS["three by three"]
    metrics, by_batch, _ = gradient_step(theirs, "grpo", cut, per_token=False)
    others, by_layer, _ = gradient_step(theirs, "grpo", cut | {"backward_order": "layer"}, per_token=False)
    assert others == pytest.approx(metrics, rel=1e-6)
    assert by_layer.keys() == by_batch.keys()
    assert max(relative_error(by_layer[name], grad) for name, grad in by_batch.items()) < 1e-6
