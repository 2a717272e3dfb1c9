"""What the pool and its workers say to each other: pickled messages, each after its length in four bytes.

Samples and rewards travel as bytes inside a message, so that one which cannot be unpickled fails its own call only.
"""

from __future__ import annotations

import mmap
import pickle
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lockstep.errors import LockstepError
from lockstep.rewards.outcome import Outcome, Reward
from lockstep.rewards.registry import RewardName

_HEADER = struct.Struct("!I")


@dataclass(frozen=True)
class Options:
    """Pool to worker, once: the `args` that rewards get."""

    args: bytes


@dataclass(frozen=True)
class Call:
    """Pool to worker: judge these samples."""

    id: int
    reward: RewardName
    reward_key: str | None
    samples: bytes
    """A pickled list of dicts of Sample fields; those at their default are left out."""
    is_group: bool


@dataclass(frozen=True)
class Cancel:
    """Pool to worker: the call's time is over, or nobody waits for it any more."""

    id: int


@dataclass(frozen=True)
class Started:
    """Worker to pool: the reward is loaded and its time runs."""

    id: int
    is_async: bool


@dataclass(frozen=True)
class Judged:
    """Worker to pool: the reward has returned."""

    id: int
    verdicts: bytes
    """A pickled list of `Verdict`, one per sample."""


@dataclass(frozen=True)
class Failed:
    """Worker to pool: the reward has not returned."""

    id: int
    outcome: Outcome
    detail: str


@dataclass(frozen=True)
class Refused:
    """Worker to pool: the reward cannot be loaded, which no failure policy covers."""

    id: int
    error: LockstepError


@dataclass(frozen=True)
class Verdict:
    """What a reward made of one sample."""

    outcome: Outcome
    reward: Reward | None = None
    detail: str = ""
    changes: dict[str, Any] | None = None
    """`Sample` fields that the reward has changed."""


def frame(message: object) -> bytes:
    body = pickle.dumps(message)
    return _HEADER.pack(len(body)) + body


def take_messages(received: bytearray) -> Iterator[Any]:
    """Remove the complete messages from the front of `received`, one by one."""
    while len(received) >= _HEADER.size:
        end = _HEADER.size + _HEADER.unpack_from(received)[0]
        if len(received) < end:
            return
        message = pickle.loads(received[_HEADER.size : end])
        del received[:end]
        yield message


class Marker:
    """A number in memory shared by the pool and one worker: the call whose code has the worker's main thread.

    It outlives the worker, so the pool knows which call a dead or blocked worker was busy with. 0 is none.
    """

    SIZE_BYTES = 8

    def __init__(self, file_descriptor: int) -> None:
        self._memory = mmap.mmap(file_descriptor, self.SIZE_BYTES)

    @property
    def holder(self) -> int:
        return int.from_bytes(self._memory[: self.SIZE_BYTES], "little")

    @holder.setter
    def holder(self, call_id: int) -> None:
        self._memory[: self.SIZE_BYTES] = call_id.to_bytes(self.SIZE_BYTES, "little")

    def close(self) -> None:
        self._memory.close()
