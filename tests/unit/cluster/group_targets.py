"""What the ranks of `test_group` and `test_engines` serve."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from lockstep.cluster.worker import Place
from lockstep.errors import OptionError, RolloutError
from lockstep.rollout.engine import Generation

if TYPE_CHECKING:  # a rank of these tests starts without torch
    from lockstep.cluster.rank import Request
    from lockstep.trainer.batch import TrainSample


class Target:
    def __init__(self, place: Place, greeting: str) -> None:
        self.place = place
        self.greeting = greeting
        if greeting == "refused":
            raise OptionError("--greeting", greeting, "nobody says that.", "Say hello.")

    def greet(self, name: str) -> str:
        self.place.report("greeted", name)
        return f"{self.greeting} {name} from {self.place.rank} of {self.place.world_size}"

    def length(self, data: bytes) -> int:
        return len(data)

    def refuse(self) -> None:
        raise OptionError("--rank", self.place.rank, "it refuses.", "Ask another.")

    def fail_at_first(self) -> None:
        if self.place.rank == 0:
            print("about to fail", file=sys.stderr)
            raise ZeroDivisionError("by the first")

    def refuse_at_first(self) -> None:
        """The second waits for it in vain."""
        if self.place.rank == 0:
            self.refuse()
        time.sleep(60)

    def die_at_second(self) -> None:
        if self.place.rank == 1:
            print("last words", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.3)
        raise ConnectionError("the others have noticed")

    def wait(self) -> str:
        """Until poked."""
        self.place.is_poked.wait()
        self.place.is_poked.clear()
        return "poked"

    def be_silent(self) -> None:
        if self.place.rank == 1:
            time.sleep(60)
        for _ in range(30):
            self.place.report("alive", None)
            time.sleep(0.1)


class Recorder:
    """Stands for a rank's trainer and engine: finishes the oldest request of each advance, and remembers all calls."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.running: list[Request] = []
        self.calls: list[Any] = []

    def take_calls(self) -> list[Any]:
        calls, self.calls = self.calls, []
        return calls

    def log_probs(self, samples: list[TrainSample], reference: bool) -> tuple[list[str], list[np.ndarray] | None]:
        return ["result"] * len(samples), None if reference else [np.full((2, 1, 1), n) for n in range(len(samples))]

    def begin_sampling(self, version: int) -> None:
        self.calls.append(("begin", version))

    def end_sampling(self) -> None:
        self.calls.append("end")

    def advance(self, requests: list[Request], aborted: list[int]) -> list[tuple[int, Generation | Exception]]:
        """A request for token 9 is refused; one for token 8 never ends by itself, and one for 7 waits to be poked."""
        self.calls.append([request.stream for request in requests])
        self.running += requests
        refused = [r for r in self.running if r.input_ids == [9]]
        endless = [r for r in self.running if r.input_ids in ([7], [8]) and r.number not in aborted]
        ended = [r for r in self.running if r.number in aborted] or refused
        ended = ended or [r for r in self.running if r not in endless][:1]
        if endless and not ended:
            is_patient = endless[0].input_ids == [7]  # ranks that decode together come back for one another
            self.place.is_poked.wait(20 if is_patient else 0.02)
        self.place.is_poked.clear()
        self.running = [r for r in self.running if r not in ended]
        error = RolloutError("prompt", [9], "it is refused.", "Ask for another.")
        done = Generation([self.place.rank], [0.0], "stop", ["1"])
        return [(r.number, error if r in refused else done) for r in ended]
