"""The rollout of supervised fine-tuning: nothing is sampled, the data's own responses are tokenized."""

from __future__ import annotations

from typing import Any

from lockstep.data.chat import SftTokenizer
from lockstep.types import RolloutFnTrainOutput


class SftRollout:
    """A rollout function over conversations: their assistant turns are the responses."""

    def __init__(self, tokenizer: SftTokenizer) -> None:
        self.tokenizer = tokenizer

    async def __call__(self, args: Any, rollout_id: int, data_source: Any) -> RolloutFnTrainOutput:
        groups = data_source.get_samples(args.rollout_batch_size)
        samples = [[self.tokenizer.sample(sample) for sample in group] for group in groups]
        count = float(len(groups))
        return RolloutFnTrainOutput(samples, {"rollout/prompts_drawn": count, "rollout/prompts_trained": count})
