"""What is asked of a sampler, the same for ours and for those beside it. NumPy is all that it needs."""

from __future__ import annotations

import numpy as np

VOCAB = 151936
"""Of Qwen3's models."""


def response_lengths(count: int, mean: int = 1024, cap: int = 4096) -> list[int]:
    """Log-normal, so that most are short and some are cut at the cap."""
    drawn = np.random.default_rng(0).lognormal(sigma=1.0, size=count)
    scale = mean / drawn.mean()
    for _ in range(20):
        scale *= mean / np.clip(drawn * scale, 1, cap).mean()
    return [int(n) for n in np.clip(drawn * scale, 1, cap).round()]


def random_prompts(count: int, tokens: int) -> list[list[int]]:
    return np.random.default_rng(1).integers(0, VOCAB, (count, tokens)).tolist()


def long_tail() -> tuple[list[list[int]], list[int]]:
    """512 requests in groups of 8: prompts of 128 tokens, and how many new ones each gets."""
    return [prompt for prompt in random_prompts(64, 128) for _ in range(8)], response_lengths(512)
