"""The held-out prompts of one evaluation data set."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

from lockstep.data.prompts import PromptFormat, PromptReader
from lockstep.data.source import PromptStream
from lockstep.data.tokenizer import Tokenizer
from lockstep.types import Sample

logger = logging.getLogger(__name__)


def load_eval_samples(
    path: str | Path,
    tokenizer: Tokenizer,
    prompt_format: PromptFormat,
    *,
    n_samples_per_eval_prompt: int = 1,
    eval_max_prompt_len: int | None = None,
    skip_malformed_rows: bool = False,
    metadata_overrides: dict[str, Any] | None = None,
) -> list[Sample]:
    """Every usable prompt of a file in file order, `n_samples_per_eval_prompt` samples each, with ids from 0.

    Over-long and malformed rows that are left out are logged with their number.

    Args:
        metadata_overrides: set in every sample's metadata, over what the row says.
    Raises:
        DataError: as `PromptReader`, or no prompt is usable.
    """
    prompts = PromptStream(
        PromptReader(path, tokenizer, prompt_format),
        rollout_max_prompt_len=eval_max_prompt_len,
        skip_malformed_rows=skip_malformed_rows,
    )
    samples: list[Sample] = []
    usable = [prompt for row in range(len(prompts)) if (prompt := prompts.usable(row)) is not None]
    if not usable:
        raise prompts.nothing_usable(prompts.skipped)
    if prompts.skipped:
        left_out = ", ".join(f"{count} {name}" for name, count in prompts.skipped.items())
        logger.warning("%s: evaluating %d of %d prompts, left out: %s", path, len(usable), len(prompts), left_out)
    for group_index, prompt in enumerate(usable):
        prompt.metadata.update(metadata_overrides or {})
        for _ in range(n_samples_per_eval_prompt):
            sample = copy.deepcopy(prompt)
            sample.group_index = group_index
            sample.index = sample.rollout_id = len(samples)
            samples.append(sample)
    return samples
