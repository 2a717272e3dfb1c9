"""Where the processes of ranks come from: an `Executor` starts them and hands over the other end of their sockets."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lockstep.cluster.wire import Channel

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from lockstep.cluster.worker import main; main(*map(int, sys.argv[2:]))"
)


class NodeLost(Exception):
    """The machine of a rank is gone, and the rank with it."""


class Process(Protocol):
    """A rank's process, wherever it runs."""

    def wait(self, timeout: float) -> int:
        """Its exit code, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: it still runs.
            NodeLost: nobody can tell any more.
        """
        ...

    def kill(self) -> None: ...

    def lines(self) -> Iterator[bytes]:
        """What it prints, until it ends."""
        ...


@dataclass(frozen=True)
class StartedRank:
    process: Process
    channel: Channel
    name: str
    """How errors and log lines call it."""
    local_rank: int
    """Its place among the ranks of its machine, and so its GPU among those that it sees."""


class Executor(Protocol):
    """Starts the processes of one group, each of which serves `worker.main`. It does not end them: the group does."""

    def start(self, num_ranks: int, timeout_s: float) -> list[StartedRank]:
        """In rank order.

        Args:
            timeout_s: of every send and receive on a channel.
        """
        ...


@dataclass(frozen=True)
class LocalProcesses:
    """Ranks as processes of this machine.

    Args:
        first_gpu: GPU of the first rank, where ranks use GPUs.
        what: what errors call a rank.
    """

    first_gpu: int = 0
    what: str = "rank"

    def start(self, num_ranks: int, timeout_s: float) -> list[StartedRank]:
        started = []
        for rank in range(num_ranks):
            ours, theirs = socket.socketpair()
            ours.settimeout(timeout_s)
            process = LocalProcess(start_worker(theirs))
            started.append(StartedRank(process, Channel(ours), f"{self.what} {rank}", self.first_gpu + rank))
        return started


class LocalProcess:
    """A child of this process."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self.pid = popen.pid
        self._popen = popen

    def wait(self, timeout: float) -> int:
        return self._popen.wait(timeout)

    def kill(self) -> None:
        self._popen.kill()

    def lines(self) -> Iterator[bytes]:
        assert self._popen.stdout is not None, "it was started with a pipe"
        with self._popen.stdout as output:
            yield from output


def start_worker(
    connection: socket.socket, environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> subprocess.Popen[bytes]:
    """A process that serves the controller at the other end of `connection`, which it takes over.

    It dies with the thread that has called this.
    """
    # -P: what the caller's folder holds is no module. Out of order lines are worse than slow ones: -u.
    with connection:
        return subprocess.Popen(
            [sys.executable, "-u", "-P", "-c", _BOOT, json.dumps(sys.path), str(connection.fileno()), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(connection.fileno(),),
            env=environment,
            cwd=folder,
        )
