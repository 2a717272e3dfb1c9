"""Sampling that gives every token the bits that training gives it, for a model that `compute_exactly` has seen.

Nothing here depends on how many rows are computed together: a prompt that is prefilled whole, in chunks or after a
shared prefix, and a response that is decoded or computed again after preemption, are the same to the last bit.

B rows of a batch, T new tokens, V vocabulary, D model width, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from lockstep.kernels.fixed_attention import FixedAttention, cached_rows, fixed_paged_decode
from lockstep.kernels.fixed_product import fixed_product
from lockstep.kernels.fused import is_fused
from lockstep.kernels.linear_log_probs import EXCLUDED
from lockstep.kernels.paged_attention import store_kv
from lockstep.kernels.sample import sample_tokens
from lockstep.models.layers.moe import RecordRoutes
from lockstep.rollout.embedded.ahead import AheadRunner
from lockstep.rollout.embedded.decode import CachedRows, DecodeStep
from lockstep.rollout.embedded.prefill import PackedSequences
from lockstep.rollout.embedded.sampler import Sampled
from lockstep.rollout.embedded.sequence import Sequence


class ExactSequences(PackedSequences):
    """Attention by the trainer's function, over what the cache holds of a sequence's keys."""

    def attend(self, attention_index: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        cache = self.caches.kv[attention_index]
        store_kv(k_TKH, v_TKH, cache, self.slots)
        if self.has_context:
            k_TKH, v_TKH = cached_rows(cache, self.key_slots)
        return self._attention(q_TNH, k_TKH, v_TKH)

    @cached_property
    def _attention(self) -> FixedAttention:
        return FixedAttention(self.lengths, self.key_lengths, self.input_ids.device)


class _ExactRows:
    """`TokenMixer` over one new token of each row. It is no `NormsAndAttends`: norms round as training's do."""

    def __init__(self, rows: CachedRows) -> None:
        self.rows = rows
        self.convolve, self.delta_rule = rows.convolve, rows.delta_rule

    def attend(self, attention_index: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        cache, rows = self.rows.caches.kv[attention_index], self.rows
        store_kv(k_TKH, v_TKH, cache, rows.slots_B)
        return fixed_paged_decode(q_TNH, cache, rows.block_tables_BM, rows.lengths_B)


class ExactStep(DecodeStep):
    """A decoding step through the blocks as training runs them, one after the other, nothing taken together."""

    def _computing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _compute(self) -> None:
        state, model = self.state, self.model
        positions_B = state.positions_R.index_select(0, self.rows_B)
        mixer = _ExactRows(CachedRows(self.caches, state, self.rows_B, positions_B))
        routes = RecordRoutes()
        x_BD = model.model.embed_tokens.forward(state.tokens_R.index_select(0, self.rows_B))
        rotary = model.rotary(positions_B)
        for block in model.model.layers.values():
            x_BD = block.forward(x_BD, rotary, mixer, routes)
        self.logits_BV = fixed_product(model.model.norm.forward(x_BD), model.lm_head.weight)
        if routes.layers:
            self.routes_BLS = routes.stacked().to(torch.int16)

    def _sample(self) -> None:
        temperatures_B = self.state.temperatures_R.index_select(0, self.rows_B)
        self.tokens_B, log_probs_B = sample_tokens(self.logits_BV, temperatures_B, self.uniforms())
        self.log_probs_B = _trainers_log_probs(self.logits_BV, self.tokens_B, log_probs_B, temperatures_B)
        self.feed_back(self.tokens_B)


class ExactRunner(AheadRunner):
    """As `AheadRunner`, on a GPU or a CPU."""

    decode_step = ExactStep
    packing = ExactSequences

    def _logits(self, hidden_BD: Tensor) -> Tensor:
        return fixed_product(hidden_BD, self.model.lm_head.weight)

    def _sample(self, sequences: list[Sequence], logits_BV: Tensor, uniforms_B: Tensor) -> Sampled:
        sampled = super()._sample(sequences, logits_BV, uniforms_B)
        if sampled.order_BV is not None and sampled.num_kept_B is not None:
            ranks_V = torch.arange(logits_BV.shape[1], device=logits_BV.device)
            is_cut_BV = torch.empty_like(sampled.order_BV, dtype=torch.bool)
            is_cut_BV.scatter_(1, sampled.order_BV, ranks_V >= sampled.num_kept_B[:, None])
            is_whole_B = self._row([int(not s.params.cuts_tail) for s in sequences], torch.bool)
            logits_BV = logits_BV.masked_fill(is_cut_BV & ~is_whole_B[:, None], EXCLUDED)
        temperatures_B = self._row([s.params.temperature for s in sequences], torch.float32)
        log_probs_B = _trainers_log_probs(logits_BV, sampled.tokens_B, sampled.log_probs_B, temperatures_B)
        return replace(sampled, log_probs_B=log_probs_B)


def _trainers_log_probs(logits_BV: Tensor, tokens_B: Tensor, log_probs_B: Tensor, temperatures_B: Tensor) -> Tensor:
    """Log-probs by the function that the trainer's are from; a CPU's sampler has just that one."""
    if not is_fused(logits_BV):
        return log_probs_B
    from lockstep.kernels.linear_log_probs_triton import log_probs_of_logits

    return log_probs_of_logits(logits_BV, tokens_B, temperatures_B.masked_fill(temperatures_B == 0, 1.0))
