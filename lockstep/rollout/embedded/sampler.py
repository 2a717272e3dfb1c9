"""From logits to tokens: temperature, kept tokens, one uniform number per row from the row's own stream.

B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _signed(value: int) -> int:
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _mix_int(value: int) -> int:
    value = (value + _GOLDEN) & (2**64 - 1)
    value = ((value ^ (value >> 30)) * _MULTIPLIERS[0]) & (2**64 - 1)
    value = ((value ^ (value >> 27)) * _MULTIPLIERS[1]) & (2**64 - 1)
    return value ^ (value >> 31)


def stream_key(*parts: int) -> int:
    """Fold (seed, rollout, group, sample, ...) into one signed 64-bit key."""
    key = 0
    for part in parts:
        key = _mix_int(key ^ _mix_int(part & (2**64 - 1)))
    return _signed(key)


def _mix(x: Tensor) -> Tensor:
    x = x + _signed(_GOLDEN)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(_MULTIPLIERS[0])
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(_MULTIPLIERS[1])
    return x ^ ((x >> 31) & (2**33 - 1))


def stream_uniform(keys_B: Tensor, positions_B: Tensor) -> Tensor:
    """The number in [0, 1) that belongs to this key and token position, float64.

    Source: SplitMix64 (Steele, Lea and Flood 2014) used as a counter-based hash.
    """
    bits = _mix(keys_B ^ _mix(positions_B.to(torch.int64)))
    return ((bits >> 11) & (2**53 - 1)).to(torch.float64) * 2.0**-53


@dataclass(frozen=True)
class Sampled:
    tokens_B: Tensor
    log_probs_B: Tensor
    order_BV: Tensor | None = None
    """Token ids from the likeliest down; None when no row was cut."""
    num_kept_B: Tensor | None = None
    """How many of them were allowed."""

    def kept_ids(self, counts: list[int]) -> list[np.ndarray]:
        """The allowed ids of each row, rising, int32. `counts` is what `num_kept_B` holds."""
        assert self.order_BV is not None, "no row was cut"
        ids = self.order_BV[: len(counts), : max(counts)].to("cpu", torch.int32).numpy()
        return [np.sort(row[:count]) for row, count in zip(ids, counts, strict=True)]


def sample(
    logits_BV: Tensor,
    temperatures_B: Tensor,
    uniforms_B: Tensor,
    *,
    top_p_B: Tensor | None = None,
    top_k_B: Tensor | None = None,
    is_forbidden_BV: Tensor | None = None,
    has_greedy: bool = True,
) -> Sampled:
    """Draw one token per row by inverting the cumulative distribution at `uniforms_B`.

    A temperature of 0 takes the largest logit; its log-prob is that of temperature 1. With `top_p_B` / `top_k_B`
    (k <= 0: no limit) the log-prob is renormalised over the kept tokens, of which none is forbidden. Where nothing is
    cut, forbidden tokens are not drawn but the log-prob stays the policy's own, over the whole vocabulary: that is what
    the trainer computes. `has_greedy` False promises that no temperature is 0, which saves a pass.
    """
    if has_greedy:
        is_greedy_B = temperatures_B == 0
        temperatures_B = temperatures_B.masked_fill(is_greedy_B, 1.0)
    policy_logits_BV = logits_BV = logits_BV.float() / temperatures_B[:, None]
    if is_forbidden_BV is not None:
        logits_BV = logits_BV.masked_fill(is_forbidden_BV, float("-inf"))
    order_BV = num_kept_B = None
    if top_p_B is not None and top_k_B is not None:
        order_BV, num_kept_B = kept_tokens(logits_BV.softmax(-1), top_p_B, top_k_B)
        is_cut_sorted = torch.arange(logits_BV.shape[1], device=logits_BV.device) >= num_kept_B[:, None]
        is_cut_BV = torch.empty_like(is_cut_sorted).scatter_(1, order_BV, is_cut_sorted)
        logits_BV = logits_BV.masked_fill(is_cut_BV, float("-inf"))
    log_probs_BV = logits_BV.log_softmax(-1)
    cumulative_BV = log_probs_BV.double().exp_().cumsum_(-1)
    thresholds_B1 = (uniforms_B * cumulative_BV[:, -1])[:, None]
    tokens_B = (
        torch.searchsorted(cumulative_BV, thresholds_B1, right=True).squeeze(1).clamp_(max=logits_BV.shape[1] - 1)
    )
    if has_greedy:
        tokens_B = torch.where(is_greedy_B, logits_BV.argmax(-1), tokens_B)
    log_probs_B = log_probs_BV.gather(1, tokens_B[:, None]).squeeze(1)
    if is_forbidden_BV is not None:
        of_policy_B = policy_logits_BV.log_softmax(-1).gather(1, tokens_B[:, None]).squeeze(1)
        is_cut_B = False if top_p_B is None or top_k_B is None else (top_p_B < 1) | (top_k_B > 0)
        log_probs_B = torch.where(torch.as_tensor(is_cut_B, device=logits_BV.device), log_probs_B, of_policy_B)
    return Sampled(tokens_B, log_probs_B, order_BV, num_kept_B)


def kept_tokens(probs_BV: Tensor, top_p_B: Tensor, top_k_B: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest set of most probable tokens whose mass reaches top_p, within the top_k most probable.

    The most probable token is always kept.

    Returns:
        token ids from the most probable down [B, V], and how many of them are kept [B].
    """
    sorted_probs, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    mass_before = sorted_probs.double().cumsum(-1) - sorted_probs
    has_mass = (mass_before < top_p_B[:, None]) | (top_p_B >= 1)[:, None]
    limits_B = torch.where(top_k_B > 0, top_k_B, probs_BV.shape[1])
    return order_BV, has_mass.sum(-1).minimum(limits_B).clamp(min=1)
