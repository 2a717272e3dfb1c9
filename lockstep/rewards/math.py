"""--rm-type math: 1.0 when the answer equals the label as mathematics, by math-verify."""

from __future__ import annotations

import logging
import re
from typing import Any

from lockstep.rewards.boxed import last_boxed
from lockstep.types import Sample

_FINAL_CHARACTERS = 1000
"""Where there is no box, the answer is looked for in this much of the response's end."""
_TEXT = re.compile(r"^\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}$")
_WORD = re.compile(r"^[a-z][a-z '-]{2,}$")


def reward(args: Any, sample: Sample) -> float:
    r"""Judge the last `\boxed{}`, or else the final answer that math-verify finds at the end of the response."""
    answer = last_boxed(sample.response)
    if answer is None and "\\boxed" in sample.response:
        return 0.0  # opened and never closed: the response was cut inside its answer
    if answer is None:
        return float(_verified(labelled_answer(sample), sample.response[-_FINAL_CHARACTERS:]))
    return float(is_equivalent(answer, labelled_answer(sample)))


def labelled_answer(sample: Sample) -> str:
    r"""The label as text; where it is a whole solution, the content of its `\boxed{}`.

    Raises:
        ValueError: there is no label, so that every response would score 0.
    """
    label = "" if sample.label is None else str(sample.label)
    label = last_boxed(label) or label
    if not label.strip():
        raise ValueError(f"sample {sample.index} has no label to compare with; see --label-key")
    return label.strip()


def is_equivalent(answer: str, label: str) -> bool:
    """Whether `answer` is `label`, as text or as mathematics.

    Words are compared as words, because as mathematics "east" would be the product of its letters.
    """
    answer = answer.strip().removesuffix(".")
    plain_answer, plain_label = _plain(answer), _plain(label)
    if plain_answer == plain_label:
        return True
    if not plain_answer or _WORD.match(plain_label):
        return False
    return _verified(label, f"\\boxed{{{answer}}}")


def _plain(text: str) -> str:
    text = text.strip().strip("$").strip()
    if match := _TEXT.match(text):
        text = match[1].strip()
    return text.casefold()


def _verified(label: str, response: str) -> bool:
    """math-verify's verdict. Its own time limits are off: they need signals, and the reward's deadline is harder."""
    from math_verify import parse, verify  # sympy: a third of a second, for workers that need it

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its limits are off
    gold = parse(f"\\boxed{{{label.strip().strip('$')}}}", parsing_timeout=None)
    return bool(verify(gold, parse(response, parsing_timeout=None), timeout_seconds=None))
