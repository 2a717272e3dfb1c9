"""The losses: what a micro-batch's log-probs contribute to the loss and to the metrics of the global batch.

Every [R] tensor has one entry per response-token prediction of the micro-batch, all samples concatenated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lockstep.algorithms.importance import importance_ratio, sequence_log_ratio, truncated_importance_weights
from lockstep.algorithms.kl import KL_ESTIMATORS, kl_penalty
from lockstep.errors import OptionError

if TYPE_CHECKING:
    from lockstep.config import AlgorithmOptions


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """One micro-batch, as the losses see it. Only `policy_log_probs` and `entropy` carry gradients."""

    policy_log_probs: Tensor
    loss_mask: Tensor
    """Bool: tokens that the policy wrote and the loss sees."""
    loss_weights: Tensor
    """Mask divided by the denominator of the global batch, see `denominators`."""
    sample_ids: Tensor
    """Sample of each token, counted from 0 within the micro-batch."""
    advantages: Tensor | None = None
    old_log_probs: Tensor | None = None
    """None on the one synchronous step of a rollout: the old policy is then the policy itself, detached."""
    rollout_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    entropy: Tensor | None = None

    def weighted_sum(self, per_token: Tensor) -> Tensor:
        """This micro-batch's share of the global mean of `per_token`."""
        return (torch.where(self.trained, per_token, 0.0) * self.loss_weights).sum()

    def difference(self, log_probs: Tensor, base_log_probs: Tensor) -> Tensor:
        """log_probs - base_log_probs where tokens are trained, else 0: nothing odd there reaches the gradient."""
        return torch.where(self.trained, log_probs - base_log_probs, 0.0)

    @property
    def trained(self) -> Tensor:
        """Masked-in tokens of samples that were not removed."""
        return self.loss_mask & (self.loss_weights != 0)


@dataclass(frozen=True)
class LossOutput:
    """A micro-batch's share of the global loss and of each metric: they add up over micro-batches and ranks."""

    loss: Tensor
    metrics: dict[str, Tensor]
    """Detached scalars by slime's names, without the `train/` prefix."""


class Loss(Protocol):
    """What a training step minimises."""

    def __call__(self, inputs: LossInputs) -> LossOutput: ...


@dataclass(frozen=True)
class SftLoss:
    """Mean negative log-likelihood of the trained tokens."""

    def __call__(self, inputs: LossInputs) -> LossOutput:
        loss = -inputs.weighted_sum(inputs.policy_log_probs)
        return LossOutput(loss, {"loss": loss.detach()})


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """GRPO and GSPO: clipped policy gradient, entropy bonus and KL penalty. Built by `make_policy_loss`."""

    sequence_level: bool
    """GSPO: one importance ratio per sample instead of one per token."""
    eps_clip: float
    eps_clip_high: float
    eps_clip_c: float | None
    entropy_coef: float
    use_kl_loss: bool
    kl_loss_coef: float
    kl_loss_type: str
    use_unbiased_kl: bool
    use_tis: bool
    get_mismatch_metrics: bool
    tis_clip: float
    tis_clip_low: float

    def __call__(self, inputs: LossInputs) -> LossOutput:
        policy = inputs.policy_log_probs
        old = policy.detach() if inputs.old_log_probs is None else inputs.old_log_probs
        token_log_ratio = inputs.difference(policy, old)
        log_ratio = token_log_ratio
        if self.sequence_level:
            log_ratio = sequence_log_ratio(token_log_ratio, inputs.trained, inputs.sample_ids)
        ratio = importance_ratio(log_ratio)
        pg_loss_per_token, is_clipped = clipped_policy_loss(
            ratio,
            _given(inputs.advantages, "advantages"),
            eps_clip=self.eps_clip,
            eps_clip_high=self.eps_clip_high,
            eps_clip_c=self.eps_clip_c,
        )
        per_token = {"pg_clipfrac": is_clipped.to(ratio.dtype), "ppo_kl": -log_ratio}
        if self.use_tis or self.get_mismatch_metrics:
            rollout = _given(inputs.rollout_log_probs, "rollout_log_probs")
            weights, tis_metrics = truncated_importance_weights(
                inputs.difference(old, rollout), tis_clip=self.tis_clip, tis_clip_low=self.tis_clip_low
            )
            per_token |= {"ois": ratio, **tis_metrics}
            if self.use_tis:
                pg_loss_per_token = pg_loss_per_token * weights
        loss = pg_loss = inputs.weighted_sum(pg_loss_per_token)
        metrics = {"pg_loss": pg_loss}
        if inputs.entropy is not None or self.entropy_coef:
            metrics["entropy_loss"] = inputs.weighted_sum(_given(inputs.entropy, "entropy"))
            if self.entropy_coef:
                loss = loss - self.entropy_coef * metrics["entropy_loss"]
        if self.use_kl_loss:
            metrics["kl_loss"] = inputs.weighted_sum(self._kl(inputs, token_log_ratio))
            if self.kl_loss_coef:
                loss = loss + self.kl_loss_coef * metrics["kl_loss"]
        metrics |= {name: inputs.weighted_sum(values.detach()) for name, values in per_token.items()}
        return LossOutput(loss, {name: value.detach() for name, value in {"loss": loss, **metrics}.items()})

    def _kl(self, inputs: LossInputs, token_log_ratio: Tensor) -> Tensor:
        return kl_penalty(
            inputs.difference(inputs.policy_log_probs, _given(inputs.ref_log_probs, "ref_log_probs")),
            self.kl_loss_type,
            importance_ratio=importance_ratio(token_log_ratio) if self.use_unbiased_kl else None,
        )


def clipped_policy_loss(
    ratio: Tensor, advantages: Tensor, *, eps_clip: float, eps_clip_high: float, eps_clip_c: float | None = None
) -> tuple[Tensor, Tensor]:
    """Per-token loss of PPO's clipped objective, and where clipping was active.

    Args:
        ratio: importance ratio policy / old, carries the gradient.
        eps_clip, eps_clip_high: the ratio is held to [1 - eps_clip, 1 + eps_clip_high] when moving further would pay.
        eps_clip_c: dual clip: where the advantage is negative, the loss is at most eps_clip_c * |advantage|.
    Source: PPO, arXiv:1707.06347; the separate upper bound, DAPO, arXiv:2503.14476; dual clip, arXiv:1912.09729.
    """
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1 - eps_clip, 1 + eps_clip_high) * advantages
    loss = torch.maximum(unclipped, clipped)
    if eps_clip_c is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -eps_clip_c * advantages), loss)
    return loss, clipped > unclipped


def make_policy_loss(
    advantage_estimator: str = "grpo",
    *,
    eps_clip: float = 0.2,
    eps_clip_high: float | None = None,
    eps_clip_c: float | None = None,
    entropy_coef: float = 0.0,
    use_kl_loss: bool = False,
    kl_loss_coef: float = 0.0,
    kl_loss_type: str = "k1",
    use_unbiased_kl: bool = False,
    use_tis: bool = False,
    get_mismatch_metrics: bool = False,
    tis_clip: float = 2.0,
    tis_clip_low: float = 0.0,
) -> PolicyLoss:
    """Choose the policy loss once; option names and defaults are slime's.

    Raises:
        OptionError: an unknown name, or a bound that cannot bound.
    """
    if advantage_estimator not in ("grpo", "gspo"):
        raise OptionError("--advantage-estimator", advantage_estimator, "It has no loss here.", "Use grpo or gspo.")
    if kl_loss_type not in KL_ESTIMATORS:
        raise OptionError(
            "--kl-loss-type", kl_loss_type, "There is no such estimator.", f"Use one of {', '.join(KL_ESTIMATORS)}."
        )
    if eps_clip_c is not None and eps_clip_c <= 1:
        raise OptionError(
            "--eps-clip-c",
            eps_clip_c,
            "Dual clip would cut the loss of an unchanged policy.",
            "Use more than 1, say 3.",
        )
    if not 0 <= tis_clip_low <= tis_clip:
        raise OptionError(
            "--tis-clip-low",
            tis_clip_low,
            f"The weights must fit into [low, {tis_clip}].",
            "Use 0 <= low <= --tis-clip.",
        )
    return PolicyLoss(
        sequence_level=advantage_estimator == "gspo",
        eps_clip=eps_clip,
        eps_clip_high=eps_clip if eps_clip_high is None else eps_clip_high,
        eps_clip_c=eps_clip_c,
        entropy_coef=entropy_coef,
        use_kl_loss=use_kl_loss,
        kl_loss_coef=kl_loss_coef,
        kl_loss_type=kl_loss_type,
        use_unbiased_kl=use_unbiased_kl,
        use_tis=use_tis,
        get_mismatch_metrics=get_mismatch_metrics,
        tis_clip=tis_clip,
        tis_clip_low=tis_clip_low,
    )


def loss_from_options(algorithm: AlgorithmOptions) -> Loss:
    """The loss a run's options ask for: `--loss-type policy_loss` or `sft_loss`."""
    if algorithm.loss_type == "sft_loss":
        return SftLoss()
    return make_policy_loss(
        algorithm.advantage_estimator,
        eps_clip=algorithm.eps_clip,
        eps_clip_high=algorithm.eps_clip_high,
        eps_clip_c=algorithm.eps_clip_c,
        entropy_coef=algorithm.entropy_coef,
        use_kl_loss=algorithm.use_kl_loss,
        kl_loss_coef=algorithm.kl_loss_coef,
        kl_loss_type=algorithm.kl_loss_type,
        use_unbiased_kl=algorithm.use_unbiased_kl,
        use_tis=algorithm.use_tis,
        get_mismatch_metrics=algorithm.get_mismatch_metrics,
        tis_clip=algorithm.tis_clip,
        tis_clip_low=algorithm.tis_clip_low,
    )


def _given(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"LossInputs.{name} is None: this loss needs it. Compute it for every micro-batch.")
    return tensor
