"""The embedded engine: schedule, run, hand out, on the trainer's own parameters.

A request's life: `generate` queues a `Sequence`; the driver task calls `step` on the engine's thread until nothing is
left; `step` asks the `Scheduler` for a batch, the `ModelRunner` computes it, finished sequences resolve their futures.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from lockstep.models import LanguageModel
from lockstep.parallel.decode import Peers
from lockstep.rollout.embedded.block_manager import BlockManager
from lockstep.rollout.embedded.choose import make_runner
from lockstep.rollout.embedded.sampler import stream_key
from lockstep.rollout.embedded.scheduler import Scheduler
from lockstep.rollout.embedded.sequence import Sequence
from lockstep.rollout.engine import FinishReason, Generation, SamplingParams

_SETTLE_TURNS = 8
"""Turns of the event loop between steps in which generate functions may react to a finished request, so that a
follow-up request joins the next step whatever the clock does."""

_ONE_THREAD_BYTES = 64 * 2**20
"""Below this, operations are so small that a second CPU thread gained a tenth when idle and lost far more when busy."""


class EmbeddedEngine:
    """Continuous batching over a paged cache.

    Args:
        decode_text: turns token ids into text, for stop strings.
        seed: the run's sampling seed; joins every stream key.
        peers: ranks that step at the same time as this one, see `ModelRunner`. They need the one who steps to agree on
            when, so `generate` is not for them.
        graph_sizes: on a GPU, batch sizes of decoding that are captured as CUDA graphs; by default
            `default_sizes`. None captures nothing.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        num_blocks: int,
        block_size: int,
        max_running: int,
        max_prefill_tokens: int,
        decode_text: Callable[[list[int]], str],
        seed: int,
        peers: Peers | None = None,
        graph_sizes: Tokens[int] | None = (),
    ) -> None:
        num_state_slots = max_running if model.config.num_delta_layers else 0
        self.blocks = BlockManager(num_blocks, block_size, num_state_slots=num_state_slots)
        self.scheduler = Scheduler(self.blocks, max_running=max_running, max_prefill_tokens=max_prefill_tokens)
        self.runner = make_runner(
            model,
            num_blocks=num_blocks,
            block_size=block_size,
            max_running=max_running,
            peers=peers,
            graph_sizes=graph_sizes,
        )
        self.seed = seed
        self.version = 0
        self._decode_text = decode_text
        self._inbox: list[Sequence] = []
        self._unanswered: set[Sequence] = set()
        """Requests whose callers wait; touched by the event loop's thread only."""
        self._driver: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(
            1, "engine", initializer=torch.set_num_threads, initargs=(_num_threads(model),)
        )

    async def generate(
        self,
        input_ids: Tokens[int],
        params: SamplingParams,
        stream: tuple[int, ...],
        on_token: Callable[[int, float], None] | None = None,
    ) -> Generation:
        """As the protocol says.

        Args:
            on_token: called on the engine's thread with every new token and its log-prob.
        """
        sequence = self.sequence(input_ids, params, stream)
        sequence.on_token = on_token
        sequence.future = asyncio.get_running_loop().create_future()
        self._inbox.append(sequence)
        self._unanswered.add(sequence)
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive())
        try:
            return await sequence.future
        except asyncio.CancelledError:
            sequence.finish_reason = "abort"
            raise

    def sequence(self, input_ids: Tokens[int], params: SamplingParams, stream: tuple[int, ...]) -> Sequence:
        seeds = (self.seed, *stream) if params.sampling_seed is None else (params.sampling_seed,)
        return Sequence(list(input_ids), params, stream, stream_key(*seeds))

    def add(self, sequence: Sequence) -> None:
        self.scheduler.add(sequence)

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    def step(self) -> list[Sequence]:
        """One forward pass; returns the sequences that finished, each with its `generation`.

        The runner may hand out the tokens of a pass one call later: then a sequence that has ended may be in a batch
        once more, and the runner drops what comes of that.
        """
        scheduled = self.scheduler.schedule()
        finished = []
        for sequence in self.runner.run(scheduled):
            sequence.weight_versions.append(str(self.version))
            sequence.has_routes = True
            if sequence.on_token is not None:
                sequence.on_token(sequence.tokens[-1], sequence.log_probs[-1])
            reason = self._finish_reason(sequence)
            if reason is not None:
                self._finish(sequence, reason)
                finished.append(sequence)
        return finished

    def finish_aborted(self) -> list[Sequence]:
        """End the sequences whose `finish_reason` was set from outside, with what they have."""
        aborted = [s for s in [*self.scheduler.running, *self.scheduler.waiting] if s.finish_reason]
        for sequence in aborted:
            self._finish(sequence, "abort")
        return aborted

    def _step_until_news(self) -> list[Sequence]:
        """Steps until a sequence finishes, a request arrives or an abort is asked for: one thread switch for many."""
        finished = self.step()
        while not finished and not self._inbox and not any(s.finish_reason for s in self.scheduler.running):
            finished = self.step()
        return finished

    async def abort_all(self) -> None:
        """As the protocol says, after the step that is running."""
        self._abort_all()

    def _abort_all(self) -> None:
        for sequence in self._unanswered:
            sequence.finish_reason = "abort"

    async def drain(self) -> None:
        while self._driver is not None and not self._driver.done():
            await asyncio.wait([self._driver])
        if not self.has_work:
            self.release_memory()

    def release_memory(self) -> None:
        """Leave the caches' memory to training, where it can be taken back at the same addresses: the next step does.

        Nothing may be under way. Weights and captured graphs stay where they are; shared prefixes are forgotten.
        """
        self.runner.forget_pending()
        if self.runner.release_memory():
            self.blocks.forget_prefixes()

    def set_version(self, version: int) -> None:
        assert not self.has_work, "weights must not change under running sequences"
        self.version = version
        self.runner.forget_pending()
        self.blocks.check_integrity()
        self.blocks.forget_prefixes()

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    async def _drive(self) -> None:
        try:
            await settle()
            while self._inbox or self.has_work:
                self._admit_inbox()
                finished = self.finish_aborted()
                if self.has_work:
                    finished += await self._step_on_thread()
                for sequence in finished:
                    self._answer(sequence, sequence.generation)
                if finished:
                    await settle()
        except BaseException as error:
            self._drop_everything(error)
            if not isinstance(error, Exception):
                raise

    async def _step_on_thread(self) -> list[Sequence]:
        step = asyncio.get_running_loop().run_in_executor(self._thread, self._step_until_news)
        try:
            return await asyncio.shield(step)
        except asyncio.CancelledError:
            self._abort_all()
            await asyncio.wait([step])  # it works on the scheduler's lists, which the caller is about to empty
            raise

    def _drop_everything(self, error: BaseException) -> None:
        """Hand the error to every caller and free all blocks; what a failed step left in them is no prefix."""
        for sequence in [*self._unanswered]:
            self._answer(sequence, error)
        self._inbox.clear()
        unfinished = [*self.scheduler.running, *self.scheduler.waiting]
        self.runner.forget_pending()
        for sequence in unfinished:
            self.scheduler.finish(sequence)
        if unfinished:
            self.blocks.forget_prefixes()

    def _admit_inbox(self) -> None:
        arrived, self._inbox = self._inbox, []
        for sequence in arrived:
            try:
                self.scheduler.add(sequence)
            except Exception as error:
                self._answer(sequence, error)

    def _answer(self, sequence: Sequence, outcome: Any) -> None:
        self._unanswered.discard(sequence)
        if sequence.future is None or sequence.future.done():
            return
        if isinstance(outcome, BaseException):
            sequence.future.set_exception(outcome)
        else:
            sequence.future.set_result(outcome)

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        params = sequence.params
        if sequence.num_new_tokens >= params.min_new_tokens:
            if sequence.tokens[-1] in params.stop_token_ids:
                return "stop"
            if params.stop:
                # A stop string ends in the newest token, and every token adds at least one byte of text.
                reach = max(len(stop.encode()) for stop in params.stop)
                first = len(sequence.prompt) - params.continued_tokens
                tail = self._decode_text(sequence.tokens[max(first, len(sequence.tokens) - reach) :])
                if any(stop in tail for stop in params.stop):
                    return "stop"
        return "length" if sequence.num_new_tokens >= params.max_new_tokens else None

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        cuts = sequence.params.cuts_tail
        sequence.finish_reason = reason
        sequence.generation = Generation(
            token_ids=sequence.new_tokens,
            log_probs=list(sequence.log_probs),
            finish_reason=reason,
            weight_versions=list(sequence.weight_versions),
            kept_token_ids=_joined(sequence.kept) if cuts else None,
            kept_token_offsets=sequence.kept_offsets() if cuts else None,
            routed_experts=self.runner.routed_experts_of(sequence) if sequence.has_routes else None,
            cached_tokens=sequence.cached_tokens,
        )
        self.scheduler.finish(sequence)


def _joined(kept: list[np.ndarray]) -> list[int]:
    return np.concatenate(kept).tolist() if kept else []


async def settle() -> None:
    """Give generate functions their turns."""
    for _ in range(_SETTLE_TURNS):
        await asyncio.sleep(0)


def _num_threads(model: LanguageModel) -> int:
    """CPU threads of the engine's operations: a fixed rule, because results repeat for equal numbers only."""
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return 1 if num_bytes < _ONE_THREAD_BYTES else torch.get_num_threads()
