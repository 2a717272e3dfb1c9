"""From rewards to advantages: one number per sample, the same for all its tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lockstep.errors import OptionError

AdvantageEstimator = Callable[[Tensor, Tensor], Tensor]
"""(rewards [N], group_ids [N]) -> advantages [N]."""


def group_relative_advantages(
    rewards: Tensor, group_ids: Tensor, *, divide_by_std: bool = True, eps: float = 1e-6
) -> Tensor:
    """Subtract each group's mean reward from the rewards of its members.

    A group is every sample of one prompt, those removed from the loss included; groups may differ in size, and their
    members may stand in any order.

    Shapes: rewards, group_ids and the result are [N], N = samples in the batch.
    Args:
        divide_by_std: also divide by the group's standard deviation (GRPO). Off is Dr. GRPO.
    Raises:
        ValueError: a group has one member, so its advantage could only be 0 (the caller drops and counts those), or
            a reward is not finite and would poison its group.
    Source: GRPO, arXiv:2402.03300 section 4.1.2; Dr. GRPO, arXiv:2503.20783.
        As slime: unbiased std (n - 1), and `eps` keeps an all-equal group at 0 instead of 0/0.
        Computed in fp64, where the rounding of the mean stays far below `eps`.
    """
    _check_finite(rewards)
    _, index, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)
    if (sizes < 2).any():
        raise ValueError(
            f"{int((sizes < 2).sum())} of {len(sizes)} groups have a single sample, whose advantage could only be 0; "
            "sample n_samples_per_prompt >= 2 or drop those groups first."
        )
    exact = rewards.double()
    means = exact.new_zeros(len(sizes)).index_add_(0, index, exact) / sizes
    advantages: Tensor = exact - means[index]
    if divide_by_std:
        variance = exact.new_zeros(len(sizes)).index_add_(0, index, advantages**2) / (sizes - 1)
        advantages = advantages / (variance.sqrt()[index] + eps)
    return advantages.to(rewards.dtype)


def raw_rewards(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """The rewards themselves as advantages: no baseline, no scale, so groups do not matter.

    Raises:
        ValueError: a reward is not finite.
    """
    _check_finite(rewards)
    return rewards


def whiten_advantages(advantages: Tensor, num_loss_tokens: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Shift and scale the advantages to mean 0 and variance 1 over all trained tokens (`--normalize-advantages`).

    Shapes: advantages, num_loss_tokens and the result are [N]; a sample counts once per trained token.
    Raises:
        ValueError: no token is trained.
    Source: as slime: unbiased variance, `eps` inside the root. Computed in fp64, and centred before squaring.
    """
    total = int(num_loss_tokens.sum())
    if total == 0:
        raise ValueError("num_loss_tokens is 0 for every sample: there is nothing to average over. Drop this batch.")
    centred = advantages.double() - (advantages.double() * num_loss_tokens).sum() / total
    variance = (centred**2 * num_loss_tokens).sum() / max(1, total - 1)
    whitened: Tensor = centred * (variance + eps).rsqrt()
    return whitened.to(advantages.dtype)


def make_advantage_estimator(
    advantage_estimator: str = "grpo",
    *,
    disable_rewards_normalization: bool = False,
    disable_grpo_std_normalization: bool = False,
) -> AdvantageEstimator:
    """Choose the estimator once. GRPO and GSPO share theirs; they differ in the loss.

    Raises:
        OptionError: an unknown estimator.
    """
    if advantage_estimator not in ("grpo", "gspo"):
        raise OptionError(
            "--advantage-estimator", advantage_estimator, "It has no advantages here.", "Use grpo or gspo."
        )
    if disable_rewards_normalization:
        return raw_rewards
    return partial(group_relative_advantages, divide_by_std=not disable_grpo_std_normalization)


def _check_finite(rewards: Tensor) -> None:
    broken = ~torch.isfinite(rewards)
    if broken.any():
        raise ValueError(
            f"{int(broken.sum())} of {len(rewards)} rewards are not finite, the first at position "
            f"{int(broken.nonzero()[0])}; let the reward function return finite numbers, or drop those samples first."
        )
