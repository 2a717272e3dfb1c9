"""From samples to packed micro-batches.

T packed tokens of whole samples, R predictions (every response token of every sample), L sparse layers, S expert slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep.algorithms import LossInputs, token_loss_weights
from lockstep.kernels.linear_log_probs import KeptTokens


@dataclass
class TrainSample:
    """What the trainer needs of one sample. Lists have one entry per response token."""

    tokens: list[int]
    response_length: int
    loss_mask: list[int]
    loss_weight: float = 0.0
    """What one trainable token of this sample weighs in the loss: the denominators, computed over the global batch."""
    advantage: float = 0.0
    rollout_log_probs: list[float] | None = None
    old_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    kept_token_ids: list[int] | None = None
    kept_token_offsets: list[int] | None = None
    routed_experts: np.ndarray[Any, Any] | None = None
    """[tokens - 1, sparse layers, top_k], as the sampler chose them."""


def pack_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of the samples of each micro-batch: first-fit decreasing into bins of `max_tokens`.

    A longer sample gets a bin of its own.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        target = next((b for b, free in enumerate(room) if free >= lengths[index]), None)
        if target is None:
            bins.append([])
            room.append(max_tokens)
            target = len(bins) - 1
        bins[target].append(index)
        room[target] -= lengths[index]
    return [sorted(members) for members in bins]


def pack_by_count(num_samples: int, micro_batch_size: int) -> list[list[int]]:
    """Indices of the samples of each micro-batch: `micro_batch_size` at a time, in order."""
    indices = list(range(num_samples))
    return [indices[i : i + micro_batch_size] for i in range(0, num_samples, micro_batch_size)]


@dataclass(frozen=True)
class MicroBatch:
    """Packed tensors of some samples. `rows_R` are the hidden states that predict `targets_R`."""

    lengths: list[int]
    response_lengths: list[int]
    input_ids_T: Tensor
    positions_T: Tensor
    rows_R: Tensor
    targets_R: Tensor
    sample_ids_R: Tensor
    loss_mask_R: Tensor
    loss_weights_R: Tensor
    advantages_R: Tensor
    rollout_log_probs_R: Tensor | None
    old_log_probs_R: Tensor | None
    ref_log_probs_R: Tensor | None
    kept: KeptTokens | None
    routed_experts_TLS: Tensor | None
    """-1 where the sampler recorded nothing, as at the last token of each sample."""

    @classmethod
    def build(cls, samples: Sequence[TrainSample], device: torch.device) -> MicroBatch:
        lengths = [len(s.tokens) for s in samples]
        responses = [s.response_length for s in samples]
        ends = np.cumsum(lengths)
        rows = [np.arange(end - r - 1, end - 1) for end, r in zip(ends, responses, strict=True)]
        sample_ids = torch.arange(len(samples)).repeat_interleave(torch.tensor(responses)).to(device)
        loss_weights = torch.tensor([s.loss_weight for s in samples], dtype=torch.float32, device=device)
        advantages = torch.tensor([s.advantage for s in samples], dtype=torch.float32, device=device)
        mask = torch.tensor(list(chain.from_iterable(s.loss_mask for s in samples)), dtype=torch.bool, device=device)
        return cls(
            lengths=lengths,
            response_lengths=responses,
            input_ids_T=torch.tensor(list(chain.from_iterable(s.tokens for s in samples)), device=device),
            positions_T=torch.cat([torch.arange(n) for n in lengths]).to(device),
            rows_R=torch.from_numpy(np.concatenate(rows)).to(device),
            targets_R=torch.tensor(
                list(chain.from_iterable(s.tokens[len(s.tokens) - s.response_length :] for s in samples)),
                dtype=torch.int64,
                device=device,
            ),
            sample_ids_R=sample_ids,
            loss_mask_R=mask,
            loss_weights_R=token_loss_weights(loss_weights, sample_ids, mask),
            advantages_R=advantages[sample_ids],
            rollout_log_probs_R=_concatenated([s.rollout_log_probs for s in samples], device),
            old_log_probs_R=_concatenated([s.old_log_probs for s in samples], device),
            ref_log_probs_R=_concatenated([s.ref_log_probs for s in samples], device),
            kept=_kept_tokens(samples, device),
            routed_experts_TLS=_routed_experts(samples, device),
        )

    def loss_inputs(self, policy_R: Tensor, entropy_R: Tensor | None) -> LossInputs:
        """What a loss takes, once the policy's log-probs and entropy `[R]` are there."""
        return LossInputs(
            policy_log_probs=policy_R,
            old_log_probs=self.old_log_probs_R,
            rollout_log_probs=self.rollout_log_probs_R,
            ref_log_probs=self.ref_log_probs_R,
            entropy=entropy_R,
            advantages=self.advantages_R,
            loss_mask=self.loss_mask_R,
            loss_weights=self.loss_weights_R,
            sample_ids=self.sample_ids_R,
        )


def _concatenated(parts: list[Any], device: torch.device) -> Tensor | None:
    if any(part is None for part in parts):
        return None
    return torch.cat([torch.as_tensor(part, dtype=torch.float32) for part in parts]).to(device)


def _kept_tokens(samples: Sequence[TrainSample], device: torch.device) -> KeptTokens | None:
    """Kept tokens of all predictions; a sample without a record keeps the whole vocabulary (empty ranges)."""
    if all(s.kept_token_ids is None for s in samples):
        return None
    ids: list[int] = []
    sizes: list[int] = []
    for sample in samples:
        ids += sample.kept_token_ids or []
        offsets = sample.kept_token_offsets or [0] * (sample.response_length + 1)
        sizes += np.diff(offsets).tolist()
    offsets_R1 = torch.tensor([0, *accumulate(sizes)], device=device)
    return KeptTokens(torch.tensor(ids, dtype=torch.int64, device=device), offsets_R1)


def _routed_experts(samples: Sequence[TrainSample], device: torch.device) -> Tensor | None:
    """Recorded experts of all tokens, -1 where a sample has none: its neighbours' record must not depend on it."""
    recorded = [np.asarray(s.routed_experts) for s in samples if s.routed_experts is not None]
    if not recorded:
        return None
    nothing = np.empty((0, *recorded[0].shape[1:]), dtype=recorded[0].dtype)
    parts = []
    for sample in samples:
        routes = np.asarray(nothing if sample.routed_experts is None else sample.routed_experts)
        known = torch.from_numpy(routes).to(torch.int64)
        parts += [known, known.new_full((len(sample.tokens) - len(known), *known.shape[1:]), -1)]
    return torch.cat(parts).to(device)
