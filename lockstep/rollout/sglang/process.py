"""A server's process: started from an environment of its own, watched, ended. It never outlives this process.

`ServerPlaces` says where servers run: `LocalServers` starts them here, others may start them on other machines.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lockstep.errors import RolloutError
from lockstep.rollout.sglang.api import ServerApi

_BOOT = """
import ctypes, os, signal, sys
prctl = ctypes.CDLL(None).prctl
prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, which outlives exec
os.getppid() == int(sys.argv[1]) or sys.exit("its parent is gone")
server = os.getpid()
if os.fork() == 0:
    signal.signal(signal.SIGUSR1, lambda *_: os.killpg(0, signal.SIGKILL))
    prctl(1, signal.SIGUSR1)
    os.getppid() == server or os.killpg(0, signal.SIGKILL)
    while True:
        signal.pause()
os.execv(sys.executable, [sys.executable, "-m", "sglang.launch_server", *sys.argv[2:]])
"""
"""SGLang's server dies with this process, and a child that waits for that ends its process group. SGLang's own children
see to it too, but not in the seconds before they have imported themselves."""
_END_S = 10.0
_POLL_S = 0.5
_QUOTED_LINES = 8


class RunningServer(ABC):
    """A server that was started for this run, wherever it runs."""

    api: ServerApi

    @property
    @abstractmethod
    def ending(self) -> str | None:
        """Why it has ended, as a sentence; None while it runs."""

    @property
    @abstractmethod
    def place(self) -> str:
        """Where it runs, for errors."""

    @property
    @abstractmethod
    def log_place(self) -> str:
        """Where all that it has printed can be read."""

    @abstractmethod
    def last_lines(self) -> str:
        """The end of what it has printed since it was started."""

    @abstractmethod
    def kill(self) -> None:
        """End it and all that it has started, at once."""

    @abstractmethod
    def terminate(self) -> None:
        """Ask it to end."""

    @abstractmethod
    def close(self) -> None:
        """End it: politely, then at once."""

    @property
    def is_alive(self) -> bool:
        return self.ending is None

    def wait_until_ready(self, timeout_s: float) -> None:
        """Return when it generates.

        Raises:
            RolloutError: it died, or took too long; with the end of its log.
        """
        deadline = time.monotonic() + timeout_s
        while not self.is_ready():
            if time.monotonic() > deadline:
                self.kill()
                raise self.error(f"it did not answer within {timeout_s:g} s.")
            time.sleep(_POLL_S)

    def is_ready(self) -> bool:
        """Whether it generates by now.

        Raises:
            RolloutError: it died.
        """
        if (ending := self.ending) is not None:
            raise self.error(ending)
        return self.api.is_healthy(timeout_s=10.0)

    def error(self, reason: str) -> RolloutError:
        return RolloutError(
            f"SGLang server {self.api.url}",
            self.place,
            f"{reason} Its last lines:\n{self.last_lines()}\n",
            f"All of them are in {self.log_place}.",
        )


class ServerPlaces(Protocol):
    """Where the servers of a run are started."""

    def start(
        self, number: int, *, python: str, words: Sequence[str], model: Path, version: str, log: Path
    ) -> RunningServer:
        """Start a server, for the first time or again. Arguments are those of `ServerProcess`."""
        ...


@dataclass(frozen=True)
class LocalServers:
    """Servers as processes of this machine.

    Args:
        first_gpu: the GPU at which the first server's begin; None on a CPU.
    """

    gpus_per_server: int
    first_gpu: int | None

    def start(
        self, number: int, *, python: str, words: Sequence[str], model: Path, version: str, log: Path
    ) -> ServerProcess:
        gpus = None
        if self.first_gpu is not None:
            begin = self.first_gpu + number * self.gpus_per_server
            gpus = range(begin, begin + self.gpus_per_server)
        environment = server_environment(os.environ, gpus)
        return ServerProcess(
            python, words, model=model, version=version, environment=environment, log=log, number=number
        )


def server_environment(environment: Mapping[str, str], gpus: range | None) -> dict[str, str]:
    """A server's environment out of that of the process which starts it.

    Args:
        gpus: places among the GPUs that this process sees; None on a CPU.
    """
    own = dict(environment)
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):  # training's; servers' memory is SGLang's matter
        own.pop(name, None)
    # Ranks of a group that are not of one mind here cannot reach each other's memory. Left alone SGLang says 0; -2 is
    # NCCL's own default, and so training's.
    own.setdefault("NCCL_CUMEM_ENABLE", "-2")
    if gpus is not None:
        given = own.get("CUDA_VISIBLE_DEVICES")
        visible = given.split(",") if given else [str(number) for number in range(1024)]
        own["CUDA_VISIBLE_DEVICES"] = ",".join(visible[gpus.start : gpus.stop])
    return own


class ServerProcess(RunningServer):
    """SGLang's server for one model folder, on a free port of this machine.

    Args:
        python: the interpreter of SGLang's environment.
        words: its arguments beside model, address and version.
        log: the file that its output is appended to.
        number: its place among the servers of a run.
        host: the address of this machine at which it answers.
    """

    def __init__(
        self,
        python: str,
        words: Sequence[str],
        *,
        model: Path,
        version: str,
        environment: Mapping[str, str],
        log: Path,
        number: int = 0,
        host: str = "127.0.0.1",
    ) -> None:
        self.log = log
        self._is_ended = False
        self.port = free_port(host)
        self.api = ServerApi(f"http://{host}:{self.port}", number)
        log.parent.mkdir(parents=True, exist_ok=True)
        ours = ["--model-path", str(model.resolve()), "--host", host, "--port", str(self.port)]
        with log.open("ab") as output:
            self._log_start = output.tell()
            self.process = subprocess.Popen(
                [python, "-c", _BOOT, str(os.getpid()), *ours, "--weight-version", version, *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )

    @property
    def ending(self) -> str | None:
        code = self.process.poll()
        return None if code is None else f"it ended with exit code {code}."

    @property
    def place(self) -> str:
        return f"process {self.process.pid}"

    @property
    def log_place(self) -> str:
        return str(self.log)

    def kill(self) -> None:
        if self._is_ended:
            return
        self._is_ended = True
        with contextlib.suppress(ProcessLookupError):  # its group is its own
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def terminate(self) -> None:
        if self.is_alive:
            self.process.terminate()

    def close(self) -> None:
        self.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_END_S)
        self.kill()

    def last_lines(self) -> str:
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join(f"    {line[:300]}" for line in lines[-_QUOTED_LINES:])


def free_port(host: str) -> int:
    """A port that nothing listens at, at this address of this machine."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
