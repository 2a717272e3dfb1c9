"""Estimators of KL(policy || reference) from the log-probs of sampled tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LOW_VAR_KL_LIMIT = 10.0


def k1(log_ratio: Tensor) -> Tensor:
    """log(policy / reference): unbiased, may be negative; as a loss its expected gradient is 0 (use it as a metric)."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """Half the squared log-ratio: biased, never negative; as a loss its expected gradient is that of the KL."""
    return log_ratio**2 / 2


def k3(log_ratio: Tensor) -> Tensor:
    """reference / policy - 1 + log(policy / reference): unbiased and never negative."""
    return torch.expm1(-log_ratio) + log_ratio


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3, "low_var_kl": k3}


def kl_penalty(log_ratio: Tensor, kl_loss_type: str, *, importance_ratio: Tensor | None = None) -> Tensor:
    """Per-token KL estimate from log(policy / reference).

    Args:
        kl_loss_type: k1, k2, k3, or low_var_kl, which is k3 clamped to +-10 (the only one that is clamped).
        importance_ratio: policy / old, multiplies the estimate (`--use-unbiased-kl`): the tokens were sampled by the
            old policy, and with its gradient the loss is unbiased for the policy's own KL.
    Source: J. Schulman, "Approximating KL divergence" (joschu.net/blog/kl-approx.html); the importance ratio,
        DeepSeek-V3.2, arXiv:2512.02556. As slime, the clamp comes after the importance ratio.
    """
    kl = KL_ESTIMATORS[kl_loss_type](log_ratio)
    if importance_ratio is not None:
        kl = importance_ratio * kl
    return kl.clamp(-LOW_VAR_KL_LIMIT, LOW_VAR_KL_LIMIT) if kl_loss_type == "low_var_kl" else kl
