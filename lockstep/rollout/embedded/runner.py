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
from lockstep.rollout.embedded.block_manager import num_snapshots
from lockstep.rollout.embedded.caches import CachedDocuments, Caches
from lockstep.rollout.embedded.sampler import Sampled, sample, stream_uniform
from lockstep.rollout.embedded.sequence import Sequence


class ModelRunner:
    """Owns the cache tensors; borrows the model from the trainer and never copies a weight.

    Args:
        most_padded_scores: attention scores per head that one padded pass may hold; a single sequence may exceed it.
        peers: other ranks that run their passes at the same time, because each has experts that all need; or None.
    """

    num_spare_slots = 0
    """Recurrent states that no sequence is given."""
    routes_device: str | None = None
    """Where chosen experts are kept; by default beside the caches."""

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
        num_states = max_running + num_snapshots(max_running) + self.num_spare_slots
        self.caches = Caches(model, num_blocks=num_blocks, block_size=block_size, num_state_slots=num_states)
        self.routed_experts: Tensor | None = None
        if config.num_sparse_layers:
            self.routed_experts = torch.zeros(
                (num_blocks * block_size, config.num_sparse_layers, config.num_experts_per_tok),
                dtype=torch.int16,
                device=self.routes_device or self.device,
            )

    @property
    def device(self) -> torch.device:
        return self.caches.kv.device

    @torch.inference_mode()
    def run(self, sequences: list[Sequence]) -> list[Sequence]:
        """Compute the scheduled tokens of the sequences; those that come to their end get a sampled token.

        Returns:
            Sequences that have a new token.
        """
        self.caches.hold()
        ending = [s for s in sequences if s.samples_next]
        self._begin_from_kept_states(sequences)
        own_passes = passes(sequences, self.most_padded_scores)
        if self.peers is not None:
            self._run_with_peers(own_passes, self.peers)
        else:
            for together in own_passes:
                self._run_pass(together)
        self._keep_states(sequences)
        return ending

    def forget_pending(self) -> None:
        """Drop tokens that are not handed out yet: nobody waits for them any more. Here there are none."""

    def release_memory(self) -> bool:
        """Give the caches' pages back until the next pass, if that is possible. What they hold is lost then."""
        if self.caches.memory.can_release:
            self.caches.memory.release()
        return self.caches.memory.can_release

    def _begin_from_kept_states(self, sequences: list[Sequence]) -> None:
        begun = [s for s in sequences if s.state_source >= 0]
        self.caches.copy_states([s.state_source for s in begun], [s.state_slot for s in begun])
        for sequence in begun:
            sequence.state_source = -1

    def _keep_states(self, sequences: list[Sequence]) -> None:
        kept = [s for s in sequences if s.state_copy >= 0]
        self.caches.copy_states([s.state_slot for s in kept], [s.state_copy for s in kept])
        for sequence in kept:
            sequence.state_copy = -1

    def _run_with_peers(self, own_passes: list[list[Sequence]], peers: Peers) -> None:
        """As many passes as the busiest rank has; in those beyond its own a rank serves the others."""
        for number in range(peers.most(len(own_passes))[0]):
            together = own_passes[number] if number < len(own_passes) else []
            (num_rows,) = peers.most(sum(s.num_scheduled_tokens for s in together))
            with peers.exchanging(num_rows):
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
        last_rows = documents.last_rows[[row for row, s in enumerate(sequences) if s.samples_next]]
        ended = [s for s in sequences if s.samples_next]
        for sequence in sequences:
            sequence.num_computed_tokens += sequence.num_scheduled_tokens
            sequence.num_scheduled_tokens = 0
        if ended:
            self._append_sampled(ended, self._logits(hidden_TD[last_rows]))

    def _logits(self, hidden_BD: Tensor) -> Tensor:
        return linear_logits(hidden_BD, self.model.lm_head.weight)

    def routed_experts_of(self, sequence: Sequence) -> np.ndarray | None:
        """Expert ids of all tokens but the last, `[tokens - 1, sparse layers, top_k]`."""
        if self.routed_experts is None:
            return None
        slots = _slots(sequence.block_table, self.block_size)[: len(sequence.tokens) - 1]
        return self.routed_experts[torch.from_numpy(slots).to(self.routed_experts.device)].cpu().numpy()

    def _append_sampled(self, sequences: list[Sequence], logits_BV: Tensor) -> None:
        keys_B = self._row([s.stream_key for s in sequences], torch.int64)
        uniforms_B = stream_uniform(keys_B, self._row([len(s.tokens) for s in sequences], torch.int64))
        sampled = self._sample(sequences, logits_BV, uniforms_B)
        kept = [] if sampled.num_kept_B is None else sampled.kept_ids(sampled.num_kept_B.tolist())
        tokens, log_probs = sampled.tokens_B.tolist(), sampled.log_probs_B.tolist()
        for row, (sequence, token, log_prob) in enumerate(zip(sequences, tokens, log_probs, strict=True)):
            sequence.tokens.append(token)
            sequence.log_probs.append(log_prob)
            if sequence.params.cuts_tail:
                sequence.kept.append(kept[row])

    def _sample(self, sequences: list[Sequence], logits_BV: Tensor, uniforms_B: Tensor) -> Sampled:
        """A token for each row as its sequence wants it."""
        params = [s.params for s in sequences]
        cuts = any(p.cuts_tail for p in params)
        return sample(
            logits_BV,
            self._row([p.temperature for p in params], torch.float32),
            uniforms_B,
            top_p_B=self._row([p.top_p if p.cuts_tail else 1.0 for p in params], torch.float64) if cuts else None,
            top_k_B=self._row([p.top_k if p.cuts_tail else -1 for p in params], torch.int64) if cuts else None,
            is_forbidden_BV=self._forbidden(sequences, logits_BV),
            has_greedy=any(p.temperature == 0 for p in params),
        )

    def _forbidden(self, sequences: list[Sequence], logits_BV: Tensor) -> Tensor | None:
        """Stop tokens of the sequences that are still too short to stop."""
        width = logits_BV.shape[1]
        places = [
            row * width + token
            for row, sequence in enumerate(sequences)
            if is_too_short(sequence)
            for token in sequence.params.stop_token_ids
        ]
        if not places:
            return None
        is_forbidden_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
        is_forbidden_BV.view(-1).index_fill_(0, self._row(places, torch.int64), True)
        return is_forbidden_BV

    def _row(self, values: list[int] | list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device, non_blocking=True)


def passes(sequences: list[Sequence], most_padded_scores: int) -> list[list[Sequence]]:
    """Sequences to compute together, one list after the other.

    Those that begin from nothing are packed and come first. The others are padded to the widest of their pass, and may
    share blocks that an earlier one is filling: they keep their order, in which those that decode are the first.
    """
    fresh = [s for s in sequences if s.num_computed_tokens == 0]
    padded: list[list[Sequence]] = []
    width = longest = 0
    for sequence in (s for s in sequences if s.num_computed_tokens):
        new, length = sequence.num_scheduled_tokens, sequence.num_computed_tokens + sequence.num_scheduled_tokens
        begins_prompts = width == 1 and new > 1
        width, longest = max(width, new), max(longest, length)
        if not padded or begins_prompts or (len(padded[-1]) + 1) * width * longest > most_padded_scores:
            width, longest = new, length
            padded.append([])
        padded[-1].append(sequence)
    return [fresh, *padded] if fresh else padded


def is_too_short(sequence: Sequence) -> bool:
    """Whether some token would end the response before its least length."""
    params, num_new = sequence.params, sequence.length - len(sequence.prompt)
    return num_new < params.min_new_tokens and bool(params.stop_token_ids)


def _slots(block_table: list[int], block_size: int) -> np.ndarray:
    return (np.array(block_table)[:, None] * block_size + np.arange(block_size)).ravel()
