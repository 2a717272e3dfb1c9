"""--rm-type gpqa: multiple choice, by the option's letter or, where none is named, by its text."""

from __future__ import annotations

import re
import string
from typing import Any

from lockstep.types import Sample

# A letter standing alone, perhaps dressed as (B), **B**, $B$ or \boxed{\text{B}}; "a" and "I" are words, not letters.
_LETTER = r"[\s*_$({\[]*(?:\\(?:boxed|text)\{\(?)*\b([A-Zb-hj-z])\b"
_STATEMENTS = (
    re.compile(r"(?i:answer|option|choice)\s*(?i:is|:)?" + _LETTER),
    re.compile(r"\b([A-Zb-hj-z])\b[\s*_$)}\]]*(?i:is\s*(?:the\s*)?correct)"),
)
_CAPITAL = re.compile(r"\b([A-Z])\b")


def reward(args: Any, sample: Sample) -> float:
    """Compare the chosen letter with the correct one; without a letter, look for the correct option's text.

    The correct option is `metadata["correct_letter"]`, or the label as a letter, as a number (from 0) or as the text
    of one of `metadata["choices"]`. Letters run over the choices, `metadata["valid_letters"]`, or A to J.
    As slime, except that a letter must stand alone ("the answer depends" chooses nothing; slime reads a D) and that
    the last statement wins over the first ("Option A is wrong. The answer is B.").
    """
    choices = _choices(sample.metadata)
    letters = _valid_letters(sample.metadata, choices)
    correct = _correct_letter(sample, letters, choices)
    text = sample.response.rpartition("</think>")[2]
    chosen = _chosen_letter(text, letters)
    if chosen and correct:
        return float(chosen == correct)
    return float(_names_one_of(text, _correct_texts(sample, letters, choices, correct)))


def _choices(metadata: dict[str, Any]) -> list[str]:
    choices = metadata.get("choices") or []
    return [str(choice) for choice in (choices.values() if isinstance(choices, dict) else choices)]


def _valid_letters(metadata: dict[str, Any], choices: list[str]) -> list[str]:
    if given := metadata.get("valid_letters"):
        return [str(letter).upper() for letter in given]
    return list(string.ascii_uppercase[: len(choices) or 10])


def _correct_letter(sample: Sample, letters: list[str], choices: list[str]) -> str | None:
    label: Any = sample.label
    if isinstance(label, int | float) and 0 <= int(label) < len(letters):
        return letters[int(label)]
    if isinstance(given := sample.metadata.get("correct_letter"), str) and given.strip():
        return given.strip().upper()
    text = str(label or "").strip()
    if text.upper() in letters:
        return text.upper()
    wanted = _simplified(text)
    return next((letters[i] for i, choice in enumerate(choices) if wanted and _simplified(choice) == wanted), None)


def _chosen_letter(text: str, letters: list[str]) -> str | None:
    for statement in _STATEMENTS:
        found = [match[1].upper() for match in statement.finditer(text) if match[1].upper() in letters]
        if found:
            return found[-1]
    capitals = [match[1] for match in _CAPITAL.finditer(text) if match[1] in letters]
    return capitals[-1] if capitals else None


def _correct_texts(sample: Sample, letters: list[str], choices: list[str], correct: str | None) -> list[str]:
    texts = [sample.metadata.get("correct_answer"), sample.metadata.get("answer_text")]
    if correct in letters and letters.index(correct) < len(choices):
        texts.append(choices[letters.index(correct)])
    if sample.label is not None and str(sample.label).strip().upper() not in letters:
        texts.append(sample.label)
    return [str(text) for text in texts if text]


def _names_one_of(text: str, targets: list[str]) -> bool:
    words = f" {_simplified(text)} "
    return any(f" {_simplified(target)} " in words for target in targets if _simplified(target))


def _simplified(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))
