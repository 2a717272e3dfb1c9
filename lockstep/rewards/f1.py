"""--rm-type f1: overlap of words with the label, as question-answering benchmarks measure it."""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Any

from lockstep.types import Sample

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_VERDICTS = {"yes", "no", "noanswer"}


def reward(args: Any, sample: Sample) -> float:
    if sample.label is None:
        raise ValueError(f"sample {sample.index} has no label to compare with; see --label-key")
    return token_f1(sample.response, str(sample.label))


def token_f1(prediction: str, truth: str) -> float:
    """Harmonic mean of precision and recall over words, counted with multiplicity.

    Source: SQuAD, arXiv:1606.05250; that yes, no and noanswer match only themselves is HotpotQA's rule,
        arXiv:1809.09600, and slime's.
    """
    predicted, true = _words(prediction), _words(truth)
    if predicted != true and (_is_verdict(predicted) or _is_verdict(true)):
        return 0.0
    common = (Counter(predicted) & Counter(true)).total()
    return 2 * common / (len(predicted) + len(true)) if common else 0.0


def _words(text: str) -> list[str]:
    """Lower case, without punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _is_verdict(words: list[str]) -> bool:
    return " ".join(words) in _VERDICTS
