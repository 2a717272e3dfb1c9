"""How a reward call can end, and which values count as a reward."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from numbers import Real
from typing import Any

Reward = float | dict[str, Any]


class Outcome(StrEnum):
    OK = "ok"
    TIMEOUT = "timeout"
    """No answer before the deadline."""
    EXCEPTION = "exception"
    """The reward raised."""
    CRASH = "crash"
    """The worker process died under the reward: `os._exit`, a segfault, a kill."""
    INVALID = "invalid"
    """The reward returned something that cannot be trained on: NaN, None, a list of the wrong length."""


FAILURES = tuple(outcome for outcome in Outcome if outcome is not Outcome.OK)


@dataclass(frozen=True)
class RewardOutcome:
    """The end of one sample's reward call, after the failure policy."""

    outcome: Outcome
    reward: Reward | None
    """None when the failure policy dropped the sample."""
    detail: str = ""
    """Why it failed, with the worker's traceback where there is one; empty when it did not."""
    duration_s: float = 0.0
    """From the start of the reward function, in its last attempt, to its answer."""


class InvalidRewardError(ValueError):
    """A value that is not a reward."""


def checked_reward(value: Any, reward_key: str | None) -> Reward:
    """`value` as a finite float, or as a dict whose entry `reward_key` is one.

    Numbers of other kinds (bool, NumPy, a tensor with one element) become floats.

    Raises:
        InvalidRewardError: it is not a reward, or has not the shape that `reward_key` asks for.
    """
    if not isinstance(value, dict):
        if reward_key:
            raise InvalidRewardError(f"the reward is {value!r}, not a dict with the entry {reward_key!r} to train on")
        return _finite(value)
    if not reward_key:
        return value
    if reward_key not in value:
        raise InvalidRewardError(f"the reward's entries are {sorted(map(str, value))}, without {reward_key!r}")
    return value | {reward_key: _finite(value[reward_key])}


def _finite(value: Any) -> float:
    if not isinstance(value, Real) and hasattr(value, "item"):
        try:
            value = value.item()
        except (ValueError, RuntimeError):
            raise InvalidRewardError(f"the reward is {value!r}, which has not exactly one element") from None
    if not isinstance(value, Real):
        raise InvalidRewardError(f"the reward is {value!r}, a {type(value).__name__}, not a number")
    if not math.isfinite(number := float(value)):
        raise InvalidRewardError(f"the reward is {number}, not a finite number")
    return number
