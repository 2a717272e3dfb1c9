"""Do the sampler and the trainer agree? Measured every step, on tokens that the current weights sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lockstep.errors import ParityError
from lockstep.trainer.engine import LogProbs
from lockstep.types import Sample

EXPLAINABLE = 1e-4
"""Differences above this, in fp32, come from another choice of experts or from a defect."""

MEAN_DIFF = "train/train_rollout_logprob_abs_diff"


@dataclass(frozen=True)
class Parity:
    """Differences of log-probs, trainer minus sampler, over the comparable tokens of a batch."""

    abs_diff: Tensor
    routes_differ: Tensor

    @property
    def mean(self) -> float:
        return float(self.abs_diff.mean()) if len(self.abs_diff) else 0.0

    def metrics(self) -> dict[str, float]:
        return {
            MEAN_DIFF: self.mean,
            "train/train_rollout_logprob_abs_diff_max": float(self.abs_diff.max()) if len(self.abs_diff) else 0.0,
            "train/routing_flips": float(self.routes_differ.sum()),
            "train/logprob_diff_unexplained": float(((self.abs_diff > EXPLAINABLE) & ~self.routes_differ).sum()),
        }


def measure_parity(samples: Sequence[Sample], trained: Sequence[LogProbs], version: int) -> Parity | None:
    """Compare token by token; tokens of other policy versions, of tools and of other engines' gaps are left out.

    Returns None when no token can be compared (SFT, or a rollout of older weights).
    """
    diffs, differ = [], []
    for sample, result in zip(samples, trained, strict=True):
        if sample.rollout_log_probs is None:
            continue
        comparable = _is_comparable(sample, version)
        diff = (result.log_probs - torch.tensor(sample.rollout_log_probs)).abs()
        diffs.append(diff[comparable])
        flags = result.routes_differ if result.routes_differ is not None else torch.zeros_like(comparable)
        differ.append(flags[comparable])
    if not diffs or not sum(map(len, diffs)):
        return None
    return Parity(torch.cat(diffs), torch.cat(differ))


def require_same_bits(samples: Sequence[Sample], trained: Sequence[LogProbs], version: int) -> None:
    """Stop the run when a log-prob of sampler and trainer differs at all (`--true-on-policy`).

    Raises:
        ParityError: naming the first token whose log-probs differ.
    """
    for sample, result in zip(samples, trained, strict=True):
        if sample.rollout_log_probs is None:
            continue
        difference = result.log_probs - torch.tensor(sample.rollout_log_probs)
        places = (_is_comparable(sample, version) & (difference != 0)).nonzero().flatten().tolist()
        if places:
            token = sample.tokens[len(sample.tokens) - sample.response_length + places[0]]
            raise ParityError(
                f"log-prob of token {token}, response token {places[0]} of sample {sample.index}",
                float(result.log_probs[places[0]]),
                f"the sampler recorded {sample.rollout_log_probs[places[0]]}, and with --true-on-policy both are the "
                f"same to the last bit ({len(places)} of this sample's {sample.response_length} tokens differ).",
                "Keep what generate functions record as the engine gave it; without --true-on-policy a run goes on.",
            )


def _is_comparable(sample: Sample, version: int) -> Tensor:
    """Which response tokens the policy of that version sampled."""
    versions = sample.weight_versions + [""] * (sample.response_length - len(sample.weight_versions))
    mask = sample.loss_mask if sample.loss_mask is not None else [1] * sample.response_length
    return torch.tensor([v == str(version) and m == 1 for v, m in zip(versions, mask, strict=True)])


def require_parity(metrics: Mapping[str, float], limit: float) -> None:
    """Stop the run when sampler and trainer disagree; a step that could not compare them passes.

    Raises:
        ParityError: the mean difference exceeds the user's limit, or is not a number.
    """
    mean = metrics.get(MEAN_DIFF, 0.0)
    if not mean <= limit:
        raise ParityError(
            MEAN_DIFF,
            mean,
            f"sampler and trainer disagree by more than --logprob-diff-limit {limit} nat per token, so the policy "
            "gradient would be wrong.",
            "Look at the samples and their per-token differences (`lockstep report`); raise the limit to go on anyway.",
        )
