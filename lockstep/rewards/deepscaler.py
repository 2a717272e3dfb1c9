"""--rm-type deepscaler: math on what follows the model's thinking, 0.0 when it never stopped thinking."""

from __future__ import annotations

from typing import Any

from lockstep.rewards.boxed import last_boxed
from lockstep.rewards.math import is_equivalent, labelled_answer
from lockstep.types import Sample


def reward(args: Any, sample: Sample) -> float:
    r"""Judge the last `\boxed{}` after `</think>` or `###Response`; without marker or box, 0.0."""
    label = labelled_answer(sample)
    answer = last_boxed(after_thinking(sample.response) or "")
    return float(answer is not None and is_equivalent(answer, label))


def after_thinking(response: str) -> str | None:
    """What follows the last `</think>`, or else the first `###Response`; None without either."""
    if "</think>" in response:
        return response.rpartition("</think>")[2]
    if "###Response" in response:
        return response.split("###Response")[1]
    return None
