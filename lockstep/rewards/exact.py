"""--rm-type exact: 1.0 when the response is the label, character for character."""

from __future__ import annotations

from typing import Any

from lockstep.types import Sample

END_TOKENS = ("<|im_end|>", "<|endoftext|>")


def reward(args: Any, sample: Sample) -> float:
    """Compare without surrounding white space and without one end token."""
    if sample.label is None:
        raise ValueError(f"sample {sample.index} has no label to compare with; see --label-key")
    return float(_without_end_token(sample.response) == str(sample.label).strip())


def _without_end_token(response: str) -> str:
    response = response.strip()
    for token in END_TOKENS:
        if response.endswith(token):
            return response.removesuffix(token).strip()
    return response
