"""How the engine's tests build an engine, send it requests and hand what it sampled to a trainer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tiny_models import random_documents

from lockstep.models import LanguageModel
from lockstep.rollout.embedded import EmbeddedEngine
from lockstep.rollout.engine import Generation, SamplingParams
from lockstep.trainer.batch import TrainSample


def letters(token_ids: list[int]) -> str:
    """Every token is one letter, so that texts can be worked out by hand: 0 is "a", 25 "z", 26 "a" again."""
    return "".join(chr(ord("a") + token % 26) for token in token_ids)


def make_engine(model: LanguageModel, **options: Any) -> EmbeddedEngine:
    defaults = {
        "num_blocks": 256,
        "block_size": 4,
        "max_running": 64,
        "max_prefill_tokens": 512,
        "decode_text": letters,
        "seed": 1,
    }
    return EmbeddedEngine(model, **(defaults | options))


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    params: SamplingParams
    stream: tuple[int, ...]


def group_requests(
    num_groups: int, size: int, *, prompt_tokens: int = 9, max_new_tokens: int = 12, **params: Any
) -> list[Request]:
    """`size` samples of each of `num_groups` prompts."""
    prompts = random_documents([prompt_tokens + group for group in range(num_groups)])
    return [
        Request(prompts[group], SamplingParams(max_new_tokens=max_new_tokens, **params), (0, 0, group, index))
        for group in range(num_groups)
        for index in range(size)
    ]


async def answers(engine: EmbeddedEngine, requests: Sequence[Request]) -> list[Generation]:
    return list(await asyncio.gather(*(engine.generate(r.prompt, r.params, r.stream) for r in requests)))


def serve(engine: EmbeddedEngine, requests: Sequence[Request]) -> list[Generation]:
    """All requests at once; the engine's blocks must all be free afterwards."""
    generations = asyncio.run(asyncio.wait_for(answers(engine, requests), 60))
    assert not engine.has_work
    engine.blocks.check_integrity()
    return generations


def trained_on(request: Request, generation: Generation) -> TrainSample:
    """What the trainer gets of a sampled response."""
    return TrainSample(
        tokens=request.prompt + generation.token_ids,
        response_length=len(generation.token_ids),
        loss_mask=[1] * len(generation.token_ids),
        rollout_log_probs=generation.log_probs,
        kept_token_ids=generation.kept_token_ids,
        kept_token_offsets=generation.kept_token_offsets,
        routed_experts=generation.routed_experts,
    )
