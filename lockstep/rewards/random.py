"""--rm-type random: a coin, to see what the algorithm does without a signal."""

from __future__ import annotations

import random
from typing import Any

from lockstep.types import Sample


def reward(args: Any, sample: Sample) -> float:
    """0.0 or 1.0, fixed by the rollout seed and the sample's index, so that a resumed run tosses the same coins."""
    return float(random.Random(f"{args.rollout_seed}:{sample.index}").getrandbits(1))
