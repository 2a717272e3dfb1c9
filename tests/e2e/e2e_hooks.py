"""The user's functions in these runs. What the options do not say comes from environment variables."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.types import DynamicFilterOutput, Sample

MOMENT = os.environ.get("E2E_MOMENT", "")
"""When this process sends itself a signal: `SIGKILL train 3`, `SIGKILL save:state rollout_0000003`."""


def strike(moment: str, place: object) -> None:
    """Send the signal if this is the moment."""
    name, _, when = MOMENT.partition(" ")
    if when == f"{moment} {place}":
        os.kill(os.getpid(), signal.Signals[name])


# Rewards


async def digits(args: Any, sample: Sample) -> float:
    """Share of digits in the response, after a delay that no seed repeats."""
    await asyncio.sleep(random.SystemRandom().uniform(0, float(os.environ.get("E2E_DELAY", "0"))))
    return sum(c.isdigit() for c in sample.response) / max(1, len(sample.response))


def endless(args: Any, sample: Sample) -> float:
    """Never answers, and blocks its process."""
    Path(os.environ["E2E_MARKER"]).touch()
    while True:
        time.sleep(60)


# Moments of a step


def at_sample(args: Any, sample: Sample, *, rollout_id: int, evaluation: bool) -> None:
    strike("eval" if evaluation else "rollout", rollout_id)


def two_of_three(args: Any, samples: list[Sample]) -> DynamicFilterOutput:
    """Drop every third group; draw from the global generator, as a user's filter may."""
    random.random()
    keep = samples[0].group_index % 3 != 1
    return DynamicFilterOutput(keep=keep, reason=None if keep else "third")


def shake_advantages(args: Any, rollout_id: int, rollout_data: Any) -> None:
    """Make the result depend on both global generators."""
    for sample in rollout_data.train_samples:
        sample.advantage *= 1 + 0.1 * random.random() + 0.1 * float(np.random.rand())
    threading.Timer(0.01, strike, ("train", rollout_id)).start()


def endless_postprocess(args: Any, rollout_id: int, rollout_data: Any) -> None:
    """Blocks the loop itself, where nothing can be cancelled."""
    Path(os.environ["E2E_MARKER"]).touch()
    while True:
        time.sleep(60)


# Moments of a save, seen through the interpreter's audit events: just before the event happens

RENAMED: list[Path] = []
"""Checkpoints whose last rename has begun."""


def at_event(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in ("os.mkdir", "open", "os.rename") or not isinstance(arguments[0], str | os.PathLike):
        return
    path = Path(arguments[0])
    if event == "open" and RENAMED and path == RENAMED[-1].parent:  # to flush it after the rename
        strike("save:renamed", RENAMED[-1].name)
    elif event == "open" and path.parent.suffix == ".incomplete":
        strike(f"save:{path.suffix.removeprefix('.')}", path.parent.stem)
    elif event == "os.mkdir" and path.suffix == ".incomplete":
        strike("save:mkdir", path.stem)
    elif event == "os.rename" and path.suffix == ".incomplete":
        strike("save:rename", path.stem)
        RENAMED.append(path.with_suffix(""))
    elif event == "os.rename" and path.name.startswith("rollout_"):
        strike("save:delete", path.name)


if " save:" in MOMENT:
    sys.addaudithook(at_event)
