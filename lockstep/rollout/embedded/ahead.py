"""The runner of a GPU: it starts the next pass before the tokens of the last one are read.

Every call of `run` starts the passes of its sequences and reads those of the call before, so the GPU has work while
the host schedules. A sequence's newest token stays on the device until then (`Sequence.num_pending_tokens`), and the
one that follows a stop is computed and dropped. The distance is always one call: batches do not depend on the clock.

B rows of a pass, T new tokens, V vocabulary, L sparse layers, S experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence as Sizes
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep.models import LanguageModel
from lockstep.models.layers.moe import RecordRoutes
from lockstep.parallel.decode import Peers
from lockstep.rollout.embedded.block_manager import num_snapshots
from lockstep.rollout.embedded.decode import DecodeStep, DecodeSteps, default_sizes
from lockstep.rollout.embedded.decode_state import DecodeState
from lockstep.rollout.embedded.prefill import PackedSequences
from lockstep.rollout.embedded.runner import ModelRunner, is_too_short
from lockstep.rollout.embedded.sampler import Sampled, stream_uniform
from lockstep.rollout.embedded.sequence import Sequence


@dataclass
class _Pass:
    """What a pass that was started will have on the host when it is done."""

    sequences: list[Sequence]
    """Those that get a token, in the order of the rows."""
    sampled: Sampled
    tokens_B: Tensor
    log_probs_B: Tensor
    num_kept_B: Tensor | None
    slots_T: np.ndarray
    routes_TLS: Tensor | None
    done: torch.cuda.Event | None


class AheadRunner(ModelRunner):
    """As `ModelRunner`; on a GPU decoding is a replay of graphs. Peers replay those of one size at the same time, each
    with as many rows as the busiest needs.

    Args:
        graph_sizes: batch sizes to capture, larger batches run without a graph; by default `default_sizes`. None
            captures nothing.
    """

    num_spare_slots = 1  # for rows that are no sequence
    routes_device = "cpu"
    decode_step = DecodeStep
    packing = PackedSequences

    def __init__(
        self,
        model: LanguageModel,
        *,
        num_blocks: int,
        block_size: int,
        max_running: int,
        peers: Peers | None = None,
        graph_sizes: Sizes[int] | None = (),
    ) -> None:
        super().__init__(model, num_blocks=num_blocks, block_size=block_size, max_running=max_running, peers=peers)
        spare_slot = max_running + num_snapshots(max_running)
        self.state = DecodeState(max_running, self.device, block_size=block_size, spare_slot=spare_slot)
        sizes = [] if graph_sizes is None else list(graph_sizes) or default_sizes(max_running)
        is_cuda = self.device.type == "cuda"
        self.steps = DecodeSteps(model, self.caches, self.state, sizes, captures=is_cuda, step=self.decode_step)
        self._started: list[_Pass] = []
        self._may_have_moved = True
        """Weights, since graphs were captured with them."""
        self._reads = torch.cuda.Stream() if is_cuda else None

    @torch.inference_mode()
    def run(self, sequences: list[Sequence]) -> list[Sequence]:
        """Start the passes of these sequences. Returns those whose tokens arrived, which are of the call before."""
        self.caches.hold()
        decoding = [s for s in sequences if self.state.row_of(s) is not None]
        others = [s for s in sequences if self.state.row_of(s) is None]
        assert not any(s.num_pending_tokens for s in others), "a prompt's tokens are known"
        earlier, self._started = self._started, []
        self._begin_from_kept_states(sequences)
        num_rows, num_tokens = self._agree(decoding, others)
        if num_rows:
            self._start_decode(decoding, num_rows)
        if num_tokens:
            self._start_prefill(others, num_tokens)
        self._keep_states(sequences)
        return [sequence for started in earlier for sequence in self._read(started)]

    def forget_pending(self) -> None:
        self._started.clear()
        self._may_have_moved = True

    def _agree(self, decoding: list[Sequence], others: list[Sequence]) -> tuple[int, int]:
        """Rows to decode and prompts' tokens to compute, of this rank or the most that any of its peers has. Where
        anything of theirs has moved, all drop their graphs: they have to capture the next ones together."""
        must_forget = int(self._may_have_moved and self.steps.have_moved())
        counts = [len(decoding), sum(s.num_scheduled_tokens for s in others), must_forget]
        num_rows, num_tokens, must_forget = counts if self.peers is None else self.peers.most(*counts)
        if must_forget:
            self.steps.forget()
        self._may_have_moved = False
        return num_rows, num_tokens

    def _start_decode(self, sequences: list[Sequence], num_rows: int) -> None:
        step = self.steps.for_rows(num_rows)
        rows, places, blocks = self.state.rows_with_new_blocks(sequences)
        padding = [self.state.spare] * (len(step.rows_B) - len(rows))
        rows_B, places_N, blocks_N = self.state.send(rows + padding, places, blocks)
        step.rows_B.copy_(rows_B)
        if places:
            self.state.add_blocks(places_N, blocks_N)
        step.compute()
        if not sequences:
            return  # all rows were there for the peers
        if any(s.params.cuts_tail or is_too_short(s) for s in sequences):
            count = len(sequences)
            sampled = self._sample(sequences, step.logits_BV[:count], step.uniforms()[:count])
            step.feed_back(sampled.tokens_B)
        else:
            step.sample()
            sampled = Sampled(step.tokens_B, step.log_probs_B)
        slots = [
            s.block_table[s.num_computed_tokens // self.block_size] * self.block_size
            + s.num_computed_tokens % self.block_size
            for s in sequences
        ]
        self._note(sequences, sequences, sampled, np.array(slots), step.routes_BLS)

    def _start_prefill(self, sequences: list[Sequence], num_tokens: int) -> None:
        if self.peers is None:
            self._prefill(sequences)
            return
        with self.peers.exchanging(num_tokens):
            if sequences:
                self._prefill(sequences)
            else:
                self.peers.serve()

    def _prefill(self, sequences: list[Sequence]) -> None:
        packed = self.packing(sequences, self.caches, self.state.send)
        routes = RecordRoutes()
        hidden_TD = self.model(packed.input_ids, packed.positions, packed, routes)
        ending = [s for s in sequences if s.samples_next]
        routes_TLS = routes.stacked().to(torch.int16) if routes.layers else None
        sampled = Sampled(packed.positions[:0], packed.positions[:0].float())
        if ending:
            ends = [row for row, s in zip(packed.last_rows, sequences, strict=True) if s.samples_next]
            self._may_have_moved |= self.state.reserve(ending)
            (ends_B,) = self.state.send(ends)
            logits_BV = self._logits(hidden_TD[ends_B])
            keys_B, positions_B = self.state.send([s.stream_key for s in ending], [s.length for s in ending])
            sampled = self._sample(ending, logits_BV, stream_uniform(keys_B, positions_B))
            self.state.begin(ending, sampled.tokens_B)
        self._note(sequences, ending, sampled, packed.slots_T, routes_TLS)

    def _note(
        self,
        computed: list[Sequence],
        sampling: list[Sequence],
        sampled: Sampled,
        slots_T: np.ndarray,
        routes_TLS: Tensor | None,
    ) -> None:
        """Send what was computed on its way to the host."""
        count = len(sampling)
        started = _Pass(
            sampling,
            sampled,
            self._to_host(sampled.tokens_B[:count]),
            self._to_host(sampled.log_probs_B[:count]),
            None if sampled.num_kept_B is None else self._to_host(sampled.num_kept_B[:count]),
            slots_T,
            None if routes_TLS is None else self._to_host(routes_TLS[: len(slots_T)]),
            None,
        )
        if self.device.type == "cuda":
            started.done = torch.cuda.Event()
            started.done.record()
        self._started.append(started)
        for sequence in computed:
            sequence.num_computed_tokens += sequence.num_scheduled_tokens
            sequence.num_scheduled_tokens = 0
        for sequence in sampling:
            sequence.num_pending_tokens += 1

    def _read(self, started: _Pass) -> list[Sequence]:
        if started.done is not None:
            started.done.synchronize()
        if started.routes_TLS is not None:
            assert self.routed_experts is not None, "a model with sparse layers records its routes"
            self.routed_experts[torch.from_numpy(started.slots_T)] = started.routes_TLS
        kept = self._kept(started)
        tokens, log_probs = started.tokens_B.tolist(), started.log_probs_B.tolist()
        arrived = []
        for row, sequence in enumerate(started.sequences):
            sequence.num_pending_tokens -= 1
            if sequence.generation is not None:
                continue  # it had ended before
            sequence.tokens.append(tokens[row])
            sequence.log_probs.append(log_probs[row])
            if sequence.params.cuts_tail:
                sequence.kept.append(kept[row])
            arrived.append(sequence)
        return arrived

    def _kept(self, started: _Pass) -> list[np.ndarray]:
        """Ids of every row's kept tokens. The pass is done, so its copy need not wait for what was started since."""
        if started.num_kept_B is None:
            return []
        with torch.cuda.stream(self._reads):
            return started.sampled.kept_ids(started.num_kept_B.tolist())

    def _to_host(self, x: Tensor) -> Tensor:
        """A copy for which the host does not wait."""
        if x.device.type == "cpu":
            return x.clone()
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)

    def _row(self, values: list[int] | list[float], dtype: torch.dtype) -> Tensor:
        row: Any = torch.tensor(values, dtype=dtype)
        if self.device.type == "cuda":
            row = row.pin_memory()
        on_device: Tensor = row.to(self.device, non_blocking=True)
        return on_device
