"""The user's functions in these runs. Behaviour beyond the options comes from environment variables."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

from lockstep.types import DynamicFilterOutput, Sample


async def digits(args: Any, sample: Sample) -> float:
    """Share of digits in the response, after a delay that no seed repeats."""
    import asyncio

    await asyncio.sleep(random.SystemRandom().uniform(0, float(os.environ.get("E2E_DELAY", "0"))))
    return sum(c.isdigit() for c in sample.response) / max(1, len(sample.response))


def two_of_three(args: Any, samples: list[Sample]) -> DynamicFilterOutput:
    """Drop every third group."""
    keep = samples[0].group_index % 3 != 1
    return DynamicFilterOutput(keep=keep, reason=None if keep else "third")
