"""One forward pass of the shared model over scheduled sequences, through the paged cache.

T new tokens of the pass, B sequences, Q new tokens per sequence (padded), L context (padded), N query heads,
K key/value heads, H head dim.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lockstep.kernels.attention import PackedAttention, paged_attention
from lockstep.kernels.linear_log_probs import linear_logits
from lockstep.models import Qwen3
from lockstep.models.layers.moe import RecordRoutes
from lockstep.rollout.embedded.sampler import sample, stream_uniform
from lockstep.rollout.embedded.sequence import Sequence


class ModelRunner:
    """Owns the cache tensors; borrows the model from the trainer and never copies a weight.

    Args:
        most_padded_scores: attention scores per head that one padded pass may hold; a single sequence may exceed it.
    """

    def __init__(self, model: Qwen3, *, num_blocks: int, block_size: int, most_padded_scores: int = 2**22) -> None:
        config = model.config
        weight = model.lm_head.weight
        self.model = model
        self.block_size = block_size
        self.most_padded_scores = most_padded_scores
        shape = (config.num_hidden_layers, 2, config.num_key_value_heads, num_blocks, block_size, config.head_dim)
        self.kv_cache = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.routed_experts: Tensor | None = None
        if config.num_sparse_layers:
            self.routed_experts = torch.zeros(
                (num_blocks * block_size, config.num_sparse_layers, config.num_experts_per_tok),
                dtype=torch.int16,
                device=weight.device,
            )

    @property
    def device(self) -> torch.device:
        return self.kv_cache.device

    @torch.inference_mode()
    def run(self, sequences: list[Sequence]) -> None:
        """Compute every uncomputed token of the sequences and append one sampled token to each."""
        for together in passes(sequences, self.most_padded_scores):
            self._run_pass(together)

    def _run_pass(self, sequences: list[Sequence]) -> None:
        batch = _Batch(sequences, self.block_size, self.kv_cache)
        routes = RecordRoutes()
        hidden_TD = self.model(batch.input_ids, batch.positions, _PagedAttend(self.kv_cache, batch), routes)
        if self.routed_experts is not None:
            self.routed_experts[batch.new_slots] = routes.stacked().to(torch.int16)
        self._append_sampled(sequences, linear_logits(hidden_TD[batch.last_rows], self.model.lm_head.weight))

    def routed_experts_of(self, sequence: Sequence) -> np.ndarray | None:
        """Expert ids of all tokens but the last, `[tokens - 1, sparse layers, top_k]`."""
        if self.routed_experts is None:
            return None
        slots = _slots(sequence.block_table, self.block_size)[: len(sequence.tokens) - 1]
        return self.routed_experts[torch.from_numpy(slots).to(self.device)].cpu().numpy()

    def _append_sampled(self, sequences: list[Sequence], logits_BV: Tensor) -> None:
        params = [s.params for s in sequences]
        cuts = any(p.cuts_tail for p in params)
        sampled = sample(
            logits_BV,
            self._row([p.temperature for p in params], torch.float32),
            stream_uniform(
                self._row([s.stream_key for s in sequences], torch.int64),
                self._row([len(s.tokens) for s in sequences], torch.int64),
            ),
            top_p_B=self._row([p.top_p if p.cuts_tail else 1.0 for p in params], torch.float64) if cuts else None,
            top_k_B=self._row([p.top_k if p.cuts_tail else -1 for p in params], torch.int64) if cuts else None,
            is_forbidden_BV=_forbidden(sequences, logits_BV),
            has_greedy=any(p.temperature == 0 for p in params),
        )
        kept = None if sampled.is_kept_BV is None else sampled.is_kept_BV.cpu()
        tokens, log_probs = sampled.tokens_B.tolist(), sampled.log_probs_B.tolist()
        for row, (sequence, token, log_prob) in enumerate(zip(sequences, tokens, log_probs, strict=True)):
            sequence.num_computed_tokens = len(sequence.tokens)
            sequence.tokens.append(token)
            sequence.log_probs.append(log_prob)
            if kept is not None and sequence.params.cuts_tail:
                sequence.kept.append(kept[row].nonzero().squeeze(1).tolist())

    def _row(self, values: list[int] | list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device, non_blocking=True)


def passes(sequences: list[Sequence], most_padded_scores: int) -> list[list[Sequence]]:
    """Sequences to compute together, one list after the other.

    Those that begin from nothing are packed and come first. The others are padded to the widest of their pass, and may
    share blocks that an earlier one is filling: they keep their order.
    """
    fresh = [s for s in sequences if s.num_computed_tokens == 0]
    padded: list[list[Sequence]] = []
    width = longest = 0
    for sequence in (s for s in sequences if s.num_computed_tokens):
        width, longest = max(width, sequence.num_uncomputed_tokens), max(longest, len(sequence.tokens))
        if not padded or (len(padded[-1]) + 1) * width * longest > most_padded_scores:
            width, longest = sequence.num_uncomputed_tokens, len(sequence.tokens)
            padded.append([])
        padded[-1].append(sequence)
    return [fresh, *padded] if fresh else padded


def _forbidden(sequences: list[Sequence], logits_BV: Tensor) -> Tensor | None:
    """Stop tokens of the sequences that are still too short to stop."""
    too_short = [s.num_new_tokens < s.params.min_new_tokens and bool(s.params.stop_token_ids) for s in sequences]
    if not any(too_short):
        return None
    is_forbidden_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        if too_short[row]:
            is_forbidden_BV[row, list(sequence.params.stop_token_ids)] = True
    return is_forbidden_BV


class _Batch:
    """Index tables of one pass, built once for all layers."""

    def __init__(self, sequences: list[Sequence], block_size: int, like: Tensor) -> None:
        device, dtype = like.device, like.dtype
        starts = np.array([s.num_computed_tokens for s in sequences])
        ends = np.array([len(s.tokens) for s in sequences])
        self.new_lengths: list[int] = (ends - starts).tolist()
        self.has_context = bool(starts.any())
        tables = np.zeros((len(sequences), max(len(s.block_table) for s in sequences)), dtype=np.int64)
        for row, sequence in enumerate(sequences):
            tables[row, : len(sequence.block_table)] = sequence.block_table
        if max(self.new_lengths) == 1:
            input_ids = [s.tokens[-1] for s in sequences]
            positions, rows = starts, np.arange(len(sequences))
        else:
            input_ids = [t for s in sequences for t in s.tokens[s.num_computed_tokens :]]
            positions = np.concatenate([np.arange(a, b) for a, b in zip(starts, ends, strict=True)])
            rows = np.repeat(np.arange(len(sequences)), self.new_lengths)
        self.input_ids = torch.tensor(input_ids).to(device)
        self.positions = torch.from_numpy(positions).to(device)
        new_slots = tables[rows, positions // block_size] * block_size + positions % block_size
        self.new_slots = torch.from_numpy(new_slots).to(device)
        self.last_rows = torch.from_numpy(np.cumsum(self.new_lengths) - 1).to(device)
        self.packed = None if self.has_context else PackedAttention(self.new_lengths, device)
        if self.has_context:
            width = max(self.new_lengths)
            columns = positions - starts[rows]
            self.padded_rows = torch.from_numpy(rows * width + columns).to(device)
            positions_BQ = np.zeros((len(sequences), width), dtype=np.int64)
            positions_BQ[rows, columns] = positions
            self.block_tables = torch.from_numpy(tables).to(device)
            is_visible = np.arange(tables.shape[1] * block_size) <= positions_BQ[:, :, None]
            self.bias_BQL = torch.from_numpy(np.where(is_visible, 0.0, -np.inf)).to(device, dtype)


class _PagedAttend:
    """`Attend` that stores new keys and values in the cache, then attends over all of a sequence's slots.

    Storing comes first, so sequences of one pass may share prefix blocks that one of them is just filling.
    """

    def __init__(self, kv_cache: Tensor, batch: _Batch) -> None:
        self.kv_cache = kv_cache
        self.batch = batch

    def __call__(self, layer_index: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        batch = self.batch
        cache = self.kv_cache[layer_index]
        new_rows = torch.cat((k_TKH, v_TKH), dim=1).transpose(0, 1)
        cache.flatten(2, 3).flatten(0, 1).index_copy_(1, batch.new_slots, new_rows)
        if batch.packed is not None:
            return batch.packed(layer_index, q_TNH, k_TKH, v_TKH)
        count, width = batch.bias_BQL.shape[:2]
        if width == 1:
            return paged_attention(q_TNH[:, None], cache, batch.block_tables, batch.bias_BQL)[:, 0]
        q_BQNH = q_TNH.new_zeros(count * width, *q_TNH.shape[1:]).index_copy_(0, batch.padded_rows, q_TNH)
        out = paged_attention(q_BQNH.unflatten(0, (count, width)), cache, batch.block_tables, batch.bias_BQL)
        return out.flatten(0, 1)[batch.padded_rows]


def _slots(block_table: list[int], block_size: int) -> np.ndarray:
    return (np.array(block_table)[:, None] * block_size + np.arange(block_size)).ravel()
