"""Advantages, losses, KL and importance correction: pure functions of tensors and numbers."""

from lockstep.algorithms.advantages import (
    AdvantageEstimator,
    group_relative_advantages,
    make_advantage_estimator,
    whiten_advantages,
)
from lockstep.algorithms.denominators import sample_loss_weights, token_loss_weights
from lockstep.algorithms.importance import importance_ratio, sequence_log_ratio, truncated_importance_weights
from lockstep.algorithms.kl import kl_penalty
from lockstep.algorithms.losses import (
    Loss,
    LossInputs,
    LossOutput,
    PolicyLoss,
    SftLoss,
    clipped_policy_loss,
    loss_from_options,
    make_policy_loss,
)

__all__ = [
    "AdvantageEstimator",
    "Loss",
    "LossInputs",
    "LossOutput",
    "PolicyLoss",
    "SftLoss",
    "clipped_policy_loss",
    "group_relative_advantages",
    "importance_ratio",
    "kl_penalty",
    "loss_from_options",
    "make_advantage_estimator",
    "make_policy_loss",
    "sample_loss_weights",
    "sequence_log_ratio",
    "token_loss_weights",
    "truncated_importance_weights",
    "whiten_advantages",
]
