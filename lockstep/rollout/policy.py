"""What a generate function samples from, and how it finds it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lockstep.data.tokenizer import Tokenizer
from lockstep.errors import RolloutError
from lockstep.rollout.engine import Generation, RolloutEngine, SamplingParams
from lockstep.types import Sample

_CURRENT: ContextVar[Policy] = ContextVar("policy")


def current_policy() -> Policy:
    """The policy of the rollout that calls this; custom generate functions start here.

    async def generate(args, sample, sampling_params):
        policy = current_policy()
        policy.start(sample)
        await policy.extend(sample, sampling_params)
        return sample
    """
    return _CURRENT.get()


def set_current_policy(policy: Policy) -> None:
    """Make `policy` what `current_policy` returns in this task and in those it starts."""
    _CURRENT.set(policy)


@dataclass
class Interruption:
    """Whether a rollout has enough: then nothing new is sampled, and what is under way comes back as it is."""

    is_asked: bool = False


@dataclass(frozen=True)
class Policy:
    """An engine with its tokenizer and limits, under the name space of one rollout's random streams."""

    engine: RolloutEngine
    tokenizer: Tokenizer
    stop_token_ids: tuple[int, ...]
    """The model's own ends of sequence; they join every call's stop ids."""
    max_context_len: int
    """Tokens of prompt and response together."""
    skip_special_tokens: bool = False
    stream: tuple[int, ...] = ()
    """First parts of every random stream's key."""
    drawn: Counter[tuple[int, ...]] = field(default_factory=Counter)
    """How often each sample was extended from each length: branches of one sample get random numbers of their own."""

    interruption: Interruption = field(default_factory=Interruption)
    url: str | None = None
    """Where the same weights answer over HTTP, if they do (`--sglang-router-port`)."""

    def for_stream(self, *stream: int) -> Policy:
        return replace(self, stream=stream, drawn=Counter(), interruption=Interruption())

    def interruptible(self) -> Policy:
        """The same for requests of its own, which one call of `interrupt` ends."""
        return replace(self, interruption=Interruption())

    async def interrupt(self) -> None:
        """Have all samples that are being written come back as they are, with the status ABORTED."""
        self.interruption.is_asked = True
        await self.engine.abort_all()

    def start(self, sample: Sample) -> None:
        """Tokenize the prompt of a sample that has no tokens yet."""
        if sample.tokens:
            return
        if not isinstance(sample.prompt, str):
            raise RolloutError(
                f"prompt of sample {sample.index}",
                f"{len(sample.prompt)} messages",
                "the built-in generate function needs a rendered prompt.",
                "Set --apply-chat-template, or give --custom-generate-function-path.",
            )
        sample.tokens = self.tokenizer.encode(sample.prompt, add_special_tokens=False)

    async def extend(self, sample: Sample, sampling_params: Mapping[str, Any]) -> Generation:
        """Let the policy write on from `sample.tokens`; everything the trainer needs is recorded in the sample.

        A sample that comes back with the status ABORTED was interrupted: return it, and a later rollout goes on with it
        (`--partial-rollout`).
        """
        if self.interruption.is_asked:
            sample.status = Sample.Status.ABORTED
            await asyncio.sleep(0)
            return Generation([], [], "abort", [])
        room = self.max_context_len - len(sample.tokens)
        if room <= 0:
            sample.status = Sample.Status.TRUNCATED
            return Generation([], [], "length", [])
        params = SamplingParams.from_dict(sampling_params)
        params = replace(params, stop_token_ids=(*params.stop_token_ids, *self.stop_token_ids)).with_room(room)
        generation = await self.engine.generate(sample.tokens, params, self._next_stream(sample))
        if generation.finish_reason == "abort" and not generation.token_ids:
            self.drawn[self._place(sample)] -= 1
        written_before = sample.response_length
        sample.append_response_tokens(
            None,
            tokens=generation.token_ids,
            log_probs=generation.log_probs,
            text=self.text(generation.token_ids),
            meta_info={"finish_reason": {"type": generation.finish_reason}},
        )
        sample.weight_versions += [""] * (written_before - len(sample.weight_versions)) + generation.weight_versions
        sample.rollout_routed_experts = generation.routed_experts
        _record_kept(sample, generation, written_before)
        given = len(sample.tokens) - len(generation.token_ids)
        sample.metadata["given_tokens"] = sample.metadata.get("given_tokens", 0) + given
        sample.metadata["cached_tokens"] = sample.metadata.get("cached_tokens", 0) + generation.cached_tokens
        return generation

    def text(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=self.skip_special_tokens)

    def _next_stream(self, sample: Sample) -> tuple[int, ...]:
        place = self._place(sample)
        branch = self.drawn[place]
        self.drawn[place] += 1
        return (*place[:-1], branch) if branch else place[:-1]

    def _place(self, sample: Sample) -> tuple[int, ...]:
        return (*self.stream, sample.group_index or 0, sample.index or 0, len(sample.tokens))


def _record_kept(sample: Sample, generation: Generation, written_before: int) -> None:
    """Add the nuclei of the new tokens; what the policy did not write has an empty range (the whole vocabulary)."""
    if generation.kept_token_ids is None or generation.kept_token_offsets is None:
        return
    ids = sample.rollout_top_p_token_ids or []
    offsets = sample.rollout_top_p_token_offsets or [0]
    offsets = offsets + [offsets[-1]] * (written_before + 1 - len(offsets))
    sample.rollout_top_p_token_ids = ids + generation.kept_token_ids
    shifted = np.asarray(generation.kept_token_offsets[1:], dtype=np.int64) + offsets[-1]
    sample.rollout_top_p_token_offsets = offsets + shifted.tolist()
