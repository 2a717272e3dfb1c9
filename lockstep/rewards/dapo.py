"""--rm-type dapo: +1 or -1 for the last "Answer:" line. Train on it with --reward-key score."""

from __future__ import annotations

import re
from typing import Any

from lockstep.rewards.math import labelled_answer
from lockstep.types import Sample

_FINAL_CHARACTERS = 300
_ANSWER = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")
_INVALID = "[INVALID]"

# What the normalisation replaces and then removes, in order: the order decides the result.
_REPLACED = (
    *(("an ", ""), ("a ", ""), (".$", "$"), (r"\$", ""), (r"\ ", ""), (" ", ""), ("mbox", "text")),
    *((r",\text{and}", ","), (r"\text{and}", ","), (r"\text{m}", r"\text{}")),
)
_REMOVED = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", r"\ldots", "sue", "points"),
    *("feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students"),
    *("childrentickets", "multiples", r"\text{s}", r"\text{.}", "\\text{\ns}", r"\text{}^2", r"\text{}^3"),
    *("\\text{\n}", r"\text{}", r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', r"\dots"),
    *("<|im_end|>", "<|endoftext|>"),
)
_UNWRAPPED = (r"\\text\{(.*?)\}", r"\\textbf\{(.*?)\}", r"\\overline\{(.*?)\}", r"\\boxed\{(.*)\}")


def reward(args: Any, sample: Sample) -> dict[str, Any]:
    """Judge the last "Answer:" within the final 300 characters, by comparing normalised strings.

    Source: DAPO, arXiv:2503.14476. As slime, except that a label which is no whole number is compared as it stands
        (slime cuts off its fraction, and fails on a label that is no number).
    """
    answers = _ANSWER.findall(sample.response[-_FINAL_CHARACTERS:])
    predicted = normalised(answers[-1]) if answers else _INVALID
    is_correct = predicted == _whole_number(normalised(labelled_answer(sample)))
    return {"score": 1.0 if is_correct else -1.0, "acc": is_correct, "pred": predicted}


def normalised(answer: str) -> str:
    r"""The shortest plain form of a final answer: no units, no LaTeX dressing, `\frac12` as `\frac{1}{2}`.

    Source: Minerva, arXiv:2206.14858, appendix D.1.
    """
    text = answer.rpartition("=")[2]
    for old, new in (*_REPLACED, *((word, "") for word in _REMOVED)):
        text = text.replace(old, new)
    text = re.sub(r".*?\$(.*?)\$.*", r"$\1$", text)
    for wrapping in _UNWRAPPED:
        text = re.sub(wrapping, r"\1", text)
    text = re.sub(r"frac([^{])(.)", r"frac{\1}{\2}", text)
    text = re.sub(r"sqrt([^{])", r"sqrt{\1}", text)
    text = text.replace("$", "")
    without_commas = text.replace(",", "")
    return without_commas if without_commas.isdigit() else text.strip()


def _whole_number(label: str) -> str:
    """`34` for 34, 34.0 and 3.4e1; other labels unchanged."""
    try:
        number = float(label)
    except ValueError:
        return label
    return str(int(number)) if number.is_integer() else label
