"""Which sequences run next."""

from __future__ import annotations

import bisect

from lockstep.errors import RolloutError
from lockstep.rollout.embedded.block_manager import BlockManager
from lockstep.rollout.embedded.sequence import Sequence


class Scheduler:
    """Every pass decodes all running sequences and fills up with prompts, of which a long one comes in chunks.

    Stream keys (group, sample) are the priorities: the first in line is admitted first and gives way last, so that a
    batch's composition does not depend on which request arrived a microsecond earlier, and the first of all always
    goes on: nobody starves.

    Args:
        max_prefill_tokens: tokens of prompts in one pass.
    """

    def __init__(self, blocks: BlockManager, *, max_running: int, max_prefill_tokens: int) -> None:
        self.blocks = blocks
        self.max_running = max_running
        self.max_prefill_tokens = max_prefill_tokens
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        """In the order of their streams, like those that wait."""
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
        _insert(self.waiting, sequence)

    def schedule(self) -> list[Sequence]:
        """The sequences of the next pass, each with its `num_scheduled_tokens`.

        Those that decode come first, then prompts, which may share blocks that one before them is filling.
        """
        self.blocks.begin_pass()
        preemptions_before = self.num_preemptions
        scheduled = self._decoding()
        budget = self.max_prefill_tokens
        for sequence in self.running:
            if sequence.num_uncomputed_tokens > 1 and budget:
                budget -= self._schedule_chunk(sequence, budget)
                scheduled.append(sequence)
        if self.num_preemptions == preemptions_before:
            scheduled += self._admitted(budget)
        return scheduled

    def finish(self, sequence: Sequence) -> None:
        """Take a running or waiting sequence out and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.blocks.release(sequence)
        else:
            self.waiting.remove(sequence)

    def _decoding(self) -> list[Sequence]:
        """Sequences with one token to compute, and with room for it: the last in line make it for the first."""
        scheduled: list[Sequence] = []
        for sequence in list(self.running):
            is_ending = sequence.num_new_tokens + sequence.num_pending_tokens >= sequence.params.max_new_tokens
            if sequence.num_uncomputed_tokens != 1 or is_ending or not sequence.block_table:
                continue  # a prompt, ended but not read yet, or just sent back
            while not self.blocks.grow(sequence):
                victim = self.running[-1]
                self._preempt(victim)
                if victim is sequence:
                    break
            else:
                sequence.num_scheduled_tokens = 1
                self.blocks.key_full_blocks(sequence)
                scheduled.append(sequence)
        return scheduled

    def _admitted(self, budget: int) -> list[Sequence]:
        """Waiting sequences that begin. Each leaves a block for every running one, or it would soon be the next to
        give way."""
        admitted: list[Sequence] = []
        position = 0
        while budget and position < len(self.waiting) and len(self.running) < self.max_running:
            sequence = self.waiting[position]
            if sequence.num_pending_tokens or self.blocks.shares_more_soon(sequence):
                position += 1
                continue
            if not self.blocks.allocate(sequence, spare=len(self.running)):
                break
            del self.waiting[position]
            _insert(self.running, sequence)
            if sequence.num_new_tokens == 0:
                sequence.cached_tokens = sequence.num_computed_tokens
            budget -= self._schedule_chunk(sequence, budget)
            admitted.append(sequence)
        return admitted

    def _schedule_chunk(self, sequence: Sequence, budget: int) -> int:
        """As many tokens as there are, within the budget; where a state is worth keeping, the chunk ends there."""
        done = sequence.num_computed_tokens
        end = min(sequence.length, done + budget)
        border = self.blocks.shareable_tokens(sequence)
        keeps_state = done < border <= end and self.blocks.can_keep_state
        sequence.num_scheduled_tokens = (border if keeps_state else end) - done
        self.blocks.key_full_blocks(sequence)
        if keeps_state:
            self.blocks.keep_state(sequence)
        return sequence.num_scheduled_tokens

    def _preempt(self, sequence: Sequence) -> None:
        """Send one back to the queue; its tokens stay, their keys and values are computed again."""
        self.running.remove(sequence)
        self.blocks.release(sequence)
        self.num_preemptions += 1
        _insert(self.waiting, sequence)


def _insert(line: list[Sequence], sequence: Sequence) -> None:
    bisect.insort(line, sequence, key=lambda s: s.stream)
