"""One forward pass of the shared model over scheduled sequences, through the caches.

T new tokens of the pass, B sequences, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lockstep.kernels.linear_log_probs import linear_logits
from lockstep.models import LanguageModel
from lockstep.models.layers.moe import RecordRoutes
from lockstep.parallel.decode import Peers
from lockstep.rollout.embedded.caches import CachedDocuments, Caches
from lockstep.rollout.embedded.sampler import sample, stream_uniform
from lockstep.rollout.embedded.sequence import Sequence


class ModelRunner:
    """Owns the cache tensors; borrows the model from the trainer and never copies a weight.

    Args:
        most_padded_scores: attention scores per head that one padded pass may hold; a single sequence may exceed it.
        peers: other ranks that run their passes at the same time, because each has experts that all need; or None.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        num_blocks: int,
        block_size: int,
        max_running: int,
        most_padded_scores: int = 2**22,
        peers: Peers | None = None,
    ) -> None:
        config = model.config
        self.model = model
        self.block_size = block_size
        self.most_padded_scores = most_padded_scores
        self.peers = peers
        self.caches = Caches(model, num_blocks=num_blocks, block_size=block_size, num_state_slots=max_running)
        self.routed_experts: Tensor | None = None
        if config.num_sparse_layers:
            self.routed_experts = torch.zeros(
                (num_blocks * block_size, config.num_sparse_layers, config.num_experts_per_tok),
                dtype=torch.int16,
                device=self.device,
            )

    @property
    def device(self) -> torch.device:
        return self.caches.kv.device

    @torch.inference_mode()
    def run(self, sequences: list[Sequence]) -> None:
        """Compute every uncomputed token of the sequences and append one sampled token to each."""
        own_passes = passes(sequences, self.most_padded_scores)
        if self.peers is not None:
            self._run_with_peers(own_passes, self.peers)
            return
        for together in own_passes:
            self._run_pass(together)

    def _run_with_peers(self, own_passes: list[list[Sequence]], peers: Peers) -> None:
        """As many passes as the busiest rank has; in those beyond its own a rank serves the others."""
        for number in range(peers.most(len(own_passes))):
            together = own_passes[number] if number < len(own_passes) else []
            peers.agree_on_rows(sum(s.num_uncomputed_tokens for s in together))
            if together:
                self._run_pass(together)
            else:
                peers.serve()

    def _run_pass(self, sequences: list[Sequence]) -> None:
        documents = CachedDocuments(sequences, self.caches)
        routes = RecordRoutes()
        hidden_TD = self.model(documents.input_ids, documents.positions, documents, routes)
        if self.routed_experts is not None:
            self.routed_experts[documents.new_slots] = routes.stacked().to(torch.int16)
        self._append_sampled(sequences, linear_logits(hidden_TD[documents.last_rows], self.model.lm_head.weight))

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


def _slots(block_table: list[int], block_size: int) -> np.ndarray:
    return (np.array(block_table)[:, None] * block_size + np.arange(block_size)).ravel()
