"""The arithmetic of a rollout: samples, steps, tokens and micro-batches, at most."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep.config import Config
from lockstep.models import ModelConfig


@dataclass(frozen=True)
class Batches:
    """Largest sizes: every sample as long as it may be."""

    samples_per_rollout: int
    steps_per_rollout: int
    longest_sample: int
    """Tokens of prompt and response together."""
    samples_per_rank: int
    """Of one step, on the data-parallel rank that has most."""
    micro_batch_tokens: int
    log_probs_tokens: int
    """Of a micro-batch in passes without gradient."""

    @classmethod
    def of(cls, config: Config, model: ModelConfig, *, dp_size: int = 1) -> Batches:
        rollout, batching = config.rollout, config.batching
        longest = longest_context(config, model)
        of_a_step = -(-rollout.global_batch_size // dp_size)

        def micro_batch(max_tokens: int | None) -> int:
            if batching.use_dynamic_batch_size and max_tokens:
                return min(max(longest, max_tokens // longest * longest), of_a_step * longest)
            return min(batching.micro_batch_size, of_a_step) * longest

        return cls(
            samples_per_rollout=rollout.samples_per_rollout,
            steps_per_rollout=rollout.steps_per_rollout,
            longest_sample=longest,
            samples_per_rank=of_a_step,
            micro_batch_tokens=micro_batch(batching.max_tokens_per_gpu),
            log_probs_tokens=micro_batch(batching.log_probs_max_tokens_per_gpu),
        )

    @property
    def tokens_per_step(self) -> int:
        """Of one rank."""
        return self.samples_per_rank * self.longest_sample

    @property
    def num_micro_batches(self) -> int:
        return -(-self.tokens_per_step // self.micro_batch_tokens)


def longest_context(config: Config, model: ModelConfig) -> int:
    """Most tokens of a prompt with its response."""
    options = config.rollout
    limit = options.rollout_max_context_len
    if limit is None and options.rollout_max_prompt_len is not None:
        limit = options.rollout_max_prompt_len + options.rollout_max_response_len
    return min(limit or model.max_position_embeddings, model.max_position_embeddings)
