"""An engine whose answers come from a function: for tests, and for trying rewards and hooks without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lockstep.rollout.engine import Generation, SamplingParams

Answer = Callable[[Sequence[int], tuple[int, ...]], list[int]]
"""(prompt tokens, random stream key) -> response tokens."""


class ScriptedEngine:
    """Answers with `answer(input_ids, stream)`, cut to the length limit; every log-prob is 0."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.version = 0

    async def generate(self, input_ids: Sequence[int], params: SamplingParams, stream: tuple[int, ...]) -> Generation:
        tokens = self.answer(input_ids, stream)
        kept = tokens[: params.max_new_tokens]
        return Generation(
            token_ids=kept,
            log_probs=[0.0] * len(kept),
            finish_reason="stop" if len(kept) == len(tokens) else "length",
            weight_versions=[str(self.version)] * len(kept),
        )

    async def abort_all(self) -> None:
        """Nothing: every request is answered at once."""

    async def drain(self) -> None: ...

    def set_version(self, version: int) -> None:
        self.version = version

    def close(self) -> None: ...
