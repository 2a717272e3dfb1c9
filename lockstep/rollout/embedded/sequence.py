"""One response in the making."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from itertools import accumulate

from lockstep.rollout.engine import FinishReason, Generation, SamplingParams


@dataclass(eq=False)
class Sequence:
    """Tokens of one request and what has been computed for them. State is derived from the lists where it can be."""

    prompt: list[int]
    params: SamplingParams
    stream: tuple[int, ...]
    stream_key: int
    tokens: list[int] = field(init=False)
    log_probs: list[float] = field(default_factory=list)
    kept: list[list[int]] = field(default_factory=list)
    weight_versions: list[str] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    """Leading tokens whose keys and values are in the cache."""
    cached_tokens: int = 0
    state_slot: int = -1
    """Row of the recurrent states that is the sequence's own; -1 without."""
    finish_reason: FinishReason | None = None
    generation: Generation | None = None
    future: asyncio.Future[Generation] | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def num_new_tokens(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.tokens) - self.num_computed_tokens

    def kept_offsets(self) -> list[int]:
        return [0, *accumulate(len(ids) for ids in self.kept)]
