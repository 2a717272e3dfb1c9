"""One machine's share of a run, as a Ray actor: it starts the processes of its ranks and of SGLang's servers.

Nothing else of a run goes through Ray: ranks talk to the controller and to each other directly.
"""

from __future__ import annotations

import contextlib
import os
import platform
import queue
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import ray

from lockstep import __version__
from lockstep.cluster.executor import start_worker
from lockstep.cluster.shared_paths import Expected
from lockstep.rollout.sglang.process import ServerProcess, free_port, server_environment

_CONNECT_S = 60.0


class RayNode:
    """The actor. Its processes die with it, and it dies with its node's Ray, or with the driver."""

    def __init__(self) -> None:
        self.address: str = ray.util.get_node_ip_address()
        self._news: queue.SimpleQueue[tuple[int, bytes | int]] = queue.SimpleQueue()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._servers: dict[int, ServerProcess] = {}
        self._starter = ThreadPoolExecutor(1)  # a server dies with the thread that has started it: this one stays

    def look(self) -> tuple[str, dict[str, str]]:
        """This node's address, and its versions of what must be alike everywhere."""
        return self.address, installed_versions()

    def complaints(self, paths: list[Expected]) -> list[tuple[int, str]]:
        """What is wrong with shared paths here, by their place in the list."""
        found = [(number, path.complaint()) for number, path in enumerate(paths)]
        return [(number, text) for number, text in found if text is not None]

    def start(
        self, ranks: list[int], controller: tuple[str, int], token: bytes, environment: Mapping[str, str], folder: str
    ) -> None:
        """Start processes that serve the controller, which knows them by token and rank.

        Args:
            folder: where they work, if there is such a folder here.
        """
        where = Path(folder) if os.path.isdir(folder) else Path.home()
        for rank in ranks:
            connection = socket.create_connection(controller, timeout=_CONNECT_S)
            connection.settimeout(None)
            connection.sendall(token + rank.to_bytes(4))
            threading.Thread(target=self._keep, args=(rank, connection, dict(environment), where), daemon=True).start()

    def news(self) -> list[tuple[int, bytes | int]]:
        """What ranks have printed since the last call, line by line, and exit codes of those that have ended. Waits."""
        news = [self._news.get()]
        with contextlib.suppress(queue.Empty):
            while True:
                news.append(self._news.get_nowait())
        return news

    def kill(self, rank: int) -> None:
        if (process := self._processes.get(rank)) is not None:
            process.kill()

    def free_port(self) -> int:
        return free_port(self.address)

    def start_server(
        self,
        number: int,
        gpus: range | None,
        environment: Mapping[str, str],
        *,
        python: str,
        words: Sequence[str],
        model: Path,
        version: str,
        log: Path,
    ) -> int:
        """Start a server's process, in place of one with the same number; returns the port at which it answers.

        Args:
            gpus: places among the GPUs of this share; None on a CPU.
        """
        server = self._servers[number] = self._starter.submit(
            ServerProcess,
            python,
            words,
            model=model,
            version=version,
            environment=server_environment(self._environment(environment), gpus),
            log=log,
            number=number,
            host=self.address,
        ).result()
        return server.port

    def server(self, number: int, method: str) -> str | None:
        """What a server's process says to one of `RunningServer`'s methods, "ending" among them."""
        server = self._servers[number]
        answer: str | None = server.ending if method == "ending" else getattr(server, method)()
        return answer

    def _environment(self, given: Mapping[str, str]) -> dict[str, str]:
        """That of a process here: this node's, and what the controller has given."""
        own = dict(os.environ)
        if "OMP_NUM_THREADS" not in given:
            own.pop("OMP_NUM_THREADS", None)  # Ray's, which counts the CPUs that it was asked for
        own.setdefault("GLOO_SOCKET_IFNAME", _interface_of(self.address))
        return own | dict(given)

    def _keep(self, rank: int, connection: socket.socket, environment: dict[str, str], folder: Path) -> None:
        """The thread of one rank: it lives as long as the process, which would die with it."""
        process = self._processes[rank] = start_worker(connection, self._environment(environment), folder)
        assert process.stdout is not None, "it was started with a pipe"
        with process.stdout as output:
            for line in output:
                self._news.put((rank, line))
        self._news.put((rank, process.wait()))


def installed_versions() -> dict[str, str]:
    """Versions by name, of this process's environment."""
    return {"Lockstep": __version__, "PyTorch": version("torch"), "Python": platform.python_version()}


def _interface_of(address: str) -> str:
    """The network interface that has this address; every 127.x.x.x is the loopback's."""
    wanted: Any = address
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            same = entry.address == wanted
            if same or (address.startswith("127.") and entry.address == "127.0.0.1"):
                return name
    return ""
