"""One response in the making."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

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
    kept: list[np.ndarray] = field(default_factory=list)
    weight_versions: list[str] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    num_keyed_blocks: int = 0
    """Leading blocks that others may share."""
    num_computed_tokens: int = 0
    """Leading tokens whose keys and values are in the cache."""
    num_scheduled_tokens: int = 0
    """Tokens of this pass, after the computed ones. A token is sampled when none is left uncomputed after it."""
    num_pending_tokens: int = 0
    """Sampled tokens that are still on the device: `tokens` gets them when a later step reads them."""
    has_routes: bool = False
    """Whether the host knows the chosen experts of all tokens but the last."""
    cached_tokens: int = 0
    state_slot: int = -1
    """Row of the recurrent states that is the sequence's own; -1 without."""
    state_source: int = -1
    """Row whose state the sequence begins this pass with: it is copied into its own before; -1 for none."""
    state_copy: int = -1
    """Row that gets a copy of the sequence's state after this pass; -1 for none."""
    finish_reason: FinishReason | None = None
    generation: Generation | None = None
    future: asyncio.Future[Generation] | None = None
    on_token: Callable[[int, float], None] | None = None
    """Called on the engine's thread with every new token and its log-prob."""

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def num_new_tokens(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def length(self) -> int:
        """Tokens, those that are still on the device included."""
        return len(self.tokens) + self.num_pending_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.length - self.num_computed_tokens

    @property
    def samples_next(self) -> bool:
        """Whether this pass ends with the last token, so that the next one can be sampled."""
        return self.num_scheduled_tokens == self.num_uncomputed_tokens

    def kept_offsets(self) -> list[int]:
        return [0, *accumulate(len(ids) for ids in self.kept)]
