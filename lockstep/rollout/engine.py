"""What a rollout engine is: the protocol that the loop and the generate functions know.

This module imports no torch, so that hooks and scripted engines stay light.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol

import numpy as np

from lockstep.errors import RolloutError

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class SamplingParams:
    """How one response is sampled; names are SGLang's, as slime hands them to custom generate functions."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 is greedy; its log-probs are those of temperature 1."""
    top_p: float = 1.0
    top_k: int = -1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0
    sampling_seed: int | None = None
    """Draw from the stream of this number, whatever the request's own: equal requests get equal responses."""
    continued_tokens: int = 0
    """Last tokens of the input that belong to the response: a stop string may begin in them."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Read slime's `sampling_params` dict; SGLang's text-only settings are of no effect here and may stay in it."""
        values = dict(values)
        for text_only in ("skip_special_tokens", "no_stop_trim", "spaces_between_special_tokens"):
            values.pop(text_only, None)
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise RolloutError(
                f"sampling_params[{unknown[0]!r}]",
                values[unknown[0]],
                "the engine does not know this setting.",
                f"Known are {', '.join(f.name for f in fields(cls))}.",
            )
        for name in ("stop", "stop_token_ids"):
            given = values.get(name) or ()
            values[name] = (given,) if isinstance(given, (str, int)) else tuple(given)
        return cls(**values)

    @property
    def cuts_tail(self) -> bool:
        """Whether some tokens are forbidden at each position, so that the kept ones must be recorded."""
        return self.temperature > 0 and (self.top_p < 1.0 or self.top_k > 0)

    def with_room(self, room_tokens: int) -> SamplingParams:
        """The same, never longer than the context allows."""
        return replace(self, max_new_tokens=min(self.max_new_tokens, room_tokens))


@dataclass(frozen=True)
class Generation:
    """What one call of `generate` returns; lists have one entry per new token."""

    token_ids: list[int]
    log_probs: list[float]
    """After temperature, and renormalised over the kept tokens."""
    finish_reason: FinishReason
    weight_versions: list[str]
    kept_token_ids: list[int] | None = None
    """Kept tokens of every position, concatenated; None when nothing was cut."""
    kept_token_offsets: list[int] | None = None
    routed_experts: np.ndarray | None = None
    """[prompt + new - 1, sparse layers, top_k] expert ids; None for dense models."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""


class RolloutEngine(Protocol):
    """Continues token sequences under the current policy version."""

    async def generate(self, input_ids: Sequence[int], params: SamplingParams, stream: tuple[int, ...]) -> Generation:
        """Sample one response. Equal `stream` keys draw equal random numbers, whatever runs beside them."""
        ...

    async def abort_all(self) -> None:
        """End every request with what it has: their callers get partial responses, which ended by "abort"."""
        ...

    async def drain(self) -> None:
        """Return when nothing is being computed any more: cancelled requests have left too."""
        ...

    def set_version(self, version: int) -> None:
        """These weights sample from now on: forget everything cached before. Nothing may be under way."""
        ...

    def close(self) -> None: ...
