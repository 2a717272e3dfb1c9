"""An engine that also takes requests from outside the rollout, whenever they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from lockstep.rollout.continuation import joined, remaining
from lockstep.rollout.embedded import EmbeddedEngine
from lockstep.rollout.engine import Generation, RolloutEngine, SamplingParams

OnToken = Callable[[int, float], None]
"""Gets every new token and its log-prob, on the engine's thread."""


class GatedEngine:
    """`RolloutEngine` that passes everything on, and knows when weights may be sampled from.

    The gate is open from `set_version` to `drain`. Requests from outside wait before it; those that are under way when
    it closes come back with what they have, and go on under the next weights.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine
        self.version: int | None = None
        self._is_open = asyncio.Event()
        self._num_outside = 0

    async def generate(self, input_ids: Sequence[int], params: SamplingParams, stream: tuple[int, ...]) -> Generation:
        return await self.engine.generate(input_ids, params, stream)

    async def generate_from_outside(
        self,
        input_ids: Sequence[int],
        params: SamplingParams,
        stream: tuple[int, ...],
        on_token: OnToken | None = None,
    ) -> Generation:
        """As `generate`, at any time; a response may have tokens of several versions.

        Args:
            on_token: told of tokens as they come where the engine can, which the embedded one in this process can.
        """
        written: Generation | None = None
        while True:
            await self._is_open.wait()
            ids, left = (input_ids, params) if written is None else remaining(input_ids, params, written)
            self._num_outside += 1
            try:
                if on_token is not None and isinstance(self.engine, EmbeddedEngine):
                    part = await self.engine.generate(ids, left, stream, on_token)
                else:
                    part = await self.engine.generate(ids, left, stream)
            finally:
                self._num_outside -= 1
            if written is not None:  # the last part has read all tokens again, so its experts are those of them all
                part = replace(joined(written, part), routed_experts=part.routed_experts)
            written = part
            if part.finish_reason != "abort" or self._is_open.is_set():
                return written
            if len(written.token_ids) == params.max_new_tokens:
                return replace(written, finish_reason="length")

    async def abort_all(self) -> None:
        await self.engine.abort_all()

    async def drain(self) -> None:
        self._is_open.clear()
        if self._num_outside:
            await self.engine.abort_all()
        await self.engine.drain()

    def set_version(self, version: int) -> None:
        self.engine.set_version(version)
        self.version = version
        self._is_open.set()

    def close(self) -> None:
        self.engine.close()
