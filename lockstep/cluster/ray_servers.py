"""SGLang's servers on the machines of a Ray cluster: a process on each machine that has GPUs of theirs.

`RayNode` starts and ends the processes; requests and weights go to the servers directly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from lockstep.errors import RolloutError
from lockstep.rollout.sglang.api import ServerApi
from lockstep.rollout.sglang.arguments import spanning_words
from lockstep.rollout.sglang.process import RunningServer

_ANSWER_S = 60.0
"""For a node to start or end a process."""


@dataclass(frozen=True)
class RayServers:
    """`ServerPlaces` over shares of nodes, whose GPUs are counted through, one server after the other.

    Args:
        nodes: address and actor of each share.
        gpus_per_node: of each share; a divisor or a multiple of `gpus_per_server`.
        environment: what servers get beside the environment of their node.
    """

    nodes: Sequence[tuple[str, Any]]
    gpus_per_node: int
    gpus_per_server: int
    uses_gpus: bool
    environment: Mapping[str, str]

    def start(
        self, number: int, *, python: str, words: Sequence[str], model: Path, version: str, log: Path
    ) -> RayServer:
        parts = server_parts(number, self.gpus_per_server, self.gpus_per_node)
        nodes = [self.nodes[node] for node, _ in parts]
        head_address, head = nodes[0]
        log = log.resolve()
        try:
            port = ray.get(head.free_port.remote(), timeout=_ANSWER_S)
            begun = [
                actor.start_server.remote(
                    number,
                    gpus if self.uses_gpus else None,
                    self.environment,
                    python=python,
                    words=[*words, *spanning_words(rank, len(parts), f"{head_address}:{port}")],
                    model=model.resolve(),
                    version=version,
                    log=log.with_stem(f"{log.stem}-node-{rank}") if rank else log,
                )
                for rank, ((_, actor), (_, gpus)) in enumerate(zip(nodes, parts, strict=True))
            ]
            ports = ray.get(begun, timeout=_ANSWER_S)
        except RayError as error:
            raise RolloutError(
                f"SGLang server {number}",
                ", ".join(address for address, _ in nodes),
                f"its processes could not be started on these nodes: {_last_line(error)}",
                "Look at these nodes; SGLang has to be at the same place on each (--sglang-python).",
            ) from None
        return RayServer(number, nodes, ports[0], log)


def server_parts(number: int, gpus_per_server: int, gpus_per_node: int) -> list[tuple[int, range]]:
    """The nodes of a server, the one that answers first, and its GPUs on each."""
    size = min(gpus_per_server, gpus_per_node)
    begins = range(number * gpus_per_server, (number + 1) * gpus_per_server, size)
    places = [divmod(begin, gpus_per_node) for begin in begins]
    return [(node, range(first, first + size)) for node, first in places]


class RayServer(RunningServer):
    """A server whose processes `RayNode`s keep. If one of them has ended, all have to."""

    def __init__(self, number: int, nodes: Sequence[tuple[str, Any]], port: int, log: Path) -> None:
        self.api = ServerApi(f"http://{nodes[0][0]}:{port}", number)
        self._nodes = nodes
        self._log = log

    @property
    def ending(self) -> str | None:
        for address, actor in self._nodes:
            try:
                ending: str | None = self._ask(actor, "ending")
            except RayError as error:
                ending = f"its node is lost. Ray says: {_last_line(error)}"
            if ending is not None:
                return ending if len(self._nodes) == 1 else f"on node {address} {ending}"
        return None

    @property
    def place(self) -> str:
        return "on node " + ", ".join(address for address, _ in self._nodes)

    @property
    def log_place(self) -> str:
        return f"{self._log} there"

    def last_lines(self) -> str:
        found = []
        for address, actor in self._nodes:
            with contextlib.suppress(RayError):
                found.append(f"    on {address}:\n{self._ask(actor, 'last_lines')}")
        return "\n".join(found)

    def kill(self) -> None:
        self._tell_all("kill")

    def terminate(self) -> None:
        self._tell_all("terminate")

    def close(self) -> None:
        self._tell_all("close")

    def _ask(self, actor: Any, method: str) -> Any:
        return ray.get(actor.server.remote(self.api.number, method), timeout=_ANSWER_S)

    def _tell_all(self, method: str) -> None:
        """On all nodes at the same time; on one that is lost nothing is left to end."""
        told = [actor.server.remote(self.api.number, method) for _, actor in self._nodes]
        for answer in told:
            with contextlib.suppress(RayError):
                ray.get(answer, timeout=_ANSWER_S)


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
