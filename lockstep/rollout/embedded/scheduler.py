"""Which sequences run next."""

from __future__ import annotations

import bisect

from lockstep.errors import RolloutError
from lockstep.rollout.embedded.block_manager import BlockManager
from lockstep.rollout.embedded.sequence import Sequence


class Scheduler:
    """Prefill first, then decode. Waiting sequences are admitted in the order of their stream keys (group, sample), so
    that a batch's composition does not depend on which request arrived a microsecond earlier."""

    def __init__(self, blocks: BlockManager, *, max_running: int, max_prefill_tokens: int) -> None:
        self.blocks = blocks
        self.max_running = max_running
        self.max_prefill_tokens = max_prefill_tokens
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a request.

        Raises:
            RolloutError: there is nothing to continue or to sample, or it could never fit, even alone.
        """
        if not sequence.prompt:
            raise RolloutError("prompt", [], "there is no token to continue.", "Start it with a token.")
        if sequence.params.max_new_tokens < 1:
            raise RolloutError(
                "sampling_params['max_new_tokens']",
                sequence.params.max_new_tokens,
                "no token would be sampled.",
                "Use 1 or more.",
            )
        capacity = self.blocks.num_blocks * self.blocks.block_size
        longest = len(sequence.prompt) + sequence.params.max_new_tokens
        if longest > capacity:
            raise RolloutError(
                "--rollout-max-tokens",
                capacity,
                f"one request may grow to {longest} tokens (prompt {len(sequence.prompt)}, response "
                f"{sequence.params.max_new_tokens}), more than the whole cache holds.",
                "Raise it, or lower --rollout-max-response-len.",
            )
        bisect.insort(self.waiting, sequence, key=lambda s: s.stream)

    def schedule(self) -> list[Sequence]:
        """The sequences of the next forward pass: either new ones to prefill, or all running ones to decode."""
        # prefill
        admitted: list[Sequence] = []
        budget = self.max_prefill_tokens
        while self.waiting and len(self.running) + len(admitted) < self.max_running:
            sequence = self.waiting[0]
            if admitted and len(sequence.tokens) > budget:
                break
            if not self.blocks.allocate(sequence):
                break
            budget -= sequence.num_uncomputed_tokens
            if sequence.num_new_tokens == 0:
                sequence.cached_tokens = sequence.num_computed_tokens
            admitted.append(self.waiting.pop(0))
        if admitted:
            self.running += admitted
            return admitted
        # decode
        scheduled: list[Sequence] = []
        for sequence in list(self.running):
            if sequence not in self.running:
                continue
            while not self.blocks.grow(sequence):
                victim = self.running[-1]
                self._preempt(victim)
                if victim is sequence:
                    break
            else:
                scheduled.append(sequence)
        return scheduled

    def finish(self, sequence: Sequence) -> None:
        """Take a running or waiting sequence out and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.blocks.release(sequence)
        else:
            self.waiting.remove(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        """Send the youngest back to the queue; its tokens stay, their keys and values are computed again."""
        self.running.remove(sequence)
        self.blocks.release(sequence)
        self.num_preemptions += 1
        bisect.insort(self.waiting, sequence, key=lambda s: s.stream)
