"""Ratios between two policies on the same tokens, and the correction for a sampler that is not the trainer."""

from __future__ import annotations

from torch import Tensor

MAX_LOG_RATIO = 80.0
"""exp of it is finite in fp32, with room for an advantage; past it a clipped ratio's gradient would be 0 * inf."""


def importance_ratio(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio), finite for any log-ratio."""
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def sequence_log_ratio(log_ratio: Tensor, loss_mask: Tensor, sample_ids: Tensor) -> Tensor:
    """Replace each token's log-ratio by the mean over its sample's masked tokens; gradient flows through the mean.

    Its exp is GSPO's length-normalised sequence ratio.

    Shapes: everything is [R]; `sample_ids` counts the micro-batch's samples from 0.
    Source: GSPO, arXiv:2507.18071, equation 7.
    """
    num_samples = int(sample_ids.max()) + 1 if len(sample_ids) else 0
    totals = log_ratio.new_zeros(num_samples).index_add(0, sample_ids, log_ratio * loss_mask)
    counts = log_ratio.new_zeros(num_samples).index_add(0, sample_ids, loss_mask.to(log_ratio.dtype))
    return (totals / counts.clamp(min=1))[sample_ids]


def truncated_importance_weights(
    log_ratio: Tensor, *, tis_clip: float = 2.0, tis_clip_low: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights that make tokens of the sampler count as if the trainer's old policy had sampled them.

    Args:
        log_ratio: old minus rollout log-probs, [R]; a constant, no gradient flows into the weights.
        tis_clip, tis_clip_low: bounds of the weights.
    Returns:
        The weights, and per token `tis` (before the bounds), `tis_clipfrac` (1 where a bound was met) and `tis_abs`
        (distance of `tis` from 1).
    Source: truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you
        off-policy RL training"), as slime's default.
    """
    ratio = importance_ratio(log_ratio.detach())
    weights = ratio.clamp(tis_clip_low, tis_clip)
    return weights, {"tis": ratio, "tis_clipfrac": (weights != ratio).to(ratio.dtype), "tis_abs": (ratio - 1).abs()}
