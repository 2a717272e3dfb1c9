"""A server's process: started from an environment of its own, watched, ended. It never outlives this process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lockstep.errors import RolloutError
from lockstep.rollout.sglang.api import ServerApi

_BOOT = (
    "import ctypes, os, sys\n"
    "ctypes.CDLL(None).prctl(1, 9)\n"  # PR_SET_PDEATHSIG, SIGKILL: it outlives exec, and SGLang's children do the same
    "os.getppid() == int(sys.argv[1]) or sys.exit('its parent is gone')\n"
    "os.execv(sys.executable, [sys.executable, '-m', 'sglang.launch_server', *sys.argv[2:]])\n"
)
_END_S = 10.0
_POLL_S = 0.5
_QUOTED_LINES = 8


class ServerProcess:
    """SGLang's server for one model folder, on a free port of this machine.

    Args:
        python: the interpreter of SGLang's environment.
        words: its arguments beside model, address and version.
        log: the file that its output is appended to.
        number: its place among the servers of a run.
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
    ) -> None:
        self.log = log
        self._is_ended = False
        self.port = _free_port()
        self.api = ServerApi(f"http://127.0.0.1:{self.port}", number)
        log.parent.mkdir(parents=True, exist_ok=True)
        ours = ["--model-path", str(model.resolve()), "--host", "127.0.0.1", "--port", str(self.port)]
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
    def is_alive(self) -> bool:
        return self.process.poll() is None

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
        if not self.is_alive:
            raise self.error(f"it ended with exit code {self.process.returncode}.")
        return self.api.is_healthy(timeout_s=10.0)

    def kill(self) -> None:
        """End it and all that it has started, at once. Its group is its own."""
        if self._is_ended:
            return
        self._is_ended = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def terminate(self) -> None:
        """Ask it to end."""
        if self.is_alive:
            self.process.terminate()

    def close(self) -> None:
        """End it: politely, then at once."""
        self.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_END_S)
        self.kill()

    def error(self, reason: str) -> RolloutError:
        return RolloutError(
            f"SGLang server {self.api.url}",
            f"process {self.process.pid}",
            f"{reason} Its last lines:\n{self.last_lines()}\n",
            f"All of them are in {self.log}.",
        )

    def last_lines(self) -> str:
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join(f"    {line[:300]}" for line in lines[-_QUOTED_LINES:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
