"""The servers of a run: started or found by address, given every new version of the weights, and brought back."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lockstep.errors import RolloutError
from lockstep.rollout.sglang.api import ServerApi
from lockstep.rollout.sglang.engine import Server
from lockstep.rollout.sglang.process import ServerProcess
from lockstep.weight_sync import Transport, WeightSource, verify_equal

logger = logging.getLogger(__name__)

_MAX_RESTARTS = 3
"""Of one server between two updates of all."""


@dataclass(frozen=True)
class ServerPlan:
    """How our own servers are started."""

    python: str
    words: list[str]
    """Arguments of every server, without model and address."""
    num_servers: int
    gpus_per_server: int
    first_gpu: int | None
    """The GPU at which the first server's begin; None on a CPU."""
    log_folder: Path
    start_timeout_s: float

    def start(self, number: int, model: Path, version: str) -> ServerProcess:
        environment = dict(os.environ)
        if self.first_gpu is not None:
            begin = self.first_gpu + number * self.gpus_per_server
            visible = _visible_gpus()[begin : begin + self.gpus_per_server]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible)
        return ServerProcess(
            self.python,
            self.words,
            model=model,
            version=version,
            environment=environment,
            log=self.log_folder / f"server-{number}.log",
        )


def _visible_gpus() -> list[str]:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(number) for number in range(1024)]


@dataclass
class _Member:
    """A server, its process if it is ours, and its way back when it is lost."""

    number: int
    server: Server
    process: ServerProcess | None
    num_restarts: int = 0
    deadline: float = field(default=0.0)


class ServerFleet:
    """`Fleet` over processes of ours (`plan`), or over servers of somebody else's (`addresses`).

    Args:
        source: where the trainer's weights are had.
        transport: how they travel.
        hf_folder: the weights of version 0.
        export_folder: where weights are written for servers that start again.
        check_equal: verify every update.
    """

    def __init__(
        self,
        *,
        plan: ServerPlan | None,
        addresses: tuple[str, ...] = (),
        source: WeightSource,
        transport: Transport,
        hf_folder: Path,
        export_folder: Path,
        start_timeout_s: float,
        check_equal: bool,
    ) -> None:
        self.plan = plan
        self.source = source
        self.transport = transport
        self.hf_folder = hf_folder
        self.export_folder = export_folder
        self.start_timeout_s = start_timeout_s
        self.check_equal = check_equal
        self.version: str | None = None
        """What `publish` was last asked for."""
        self._is_exported = False
        self._loaded: dict[Server, str] = {}
        """What the servers have, as far as we know."""
        self._members: dict[Server, _Member] = {}
        for number in range(plan.num_servers if plan is not None else 0):
            assert plan is not None
            process = plan.start(number, hf_folder, "0")
            self._add(_Member(number, Server(process.api), process))
            self._loaded[self.servers[-1]] = "0"
        for number, address in enumerate(addresses):
            url = address if "://" in address else f"http://{address}"
            self._add(_Member(number, Server(ServerApi(url.rstrip("/"))), None))

    @property
    def servers(self) -> list[Server]:
        return list(self._members)

    def _add(self, member: _Member) -> None:
        self._members[member.server] = member

    def wait_until_ready(self) -> None:
        """Return when all servers generate.

        Raises:
            RolloutError: one does not, with the end of its log.
        """
        deadline = time.monotonic() + self.start_timeout_s
        for member in self._members.values():
            left = max(1.0, deadline - time.monotonic())
            if member.process is not None:
                member.process.wait_until_ready(left)
            else:
                _wait_for_external(member.server, left)

    def publish(self, version: int) -> None:
        """Bring these weights to all servers; none is sent anything before it says that it has them.

        A server of ours that has ended, before or during the update, is started again from these weights.

        Raises:
            RolloutError: a server cannot be updated.
        """
        self.version, self._is_exported = str(version), False
        for server in self.servers:
            server.version = None
        self._restart_ended()
        try:
            self._update(self.version)
        except RolloutError:
            if not self._restart_ended():
                raise
            self._update(self.version)
        for server, member in self._members.items():
            self._open(server)
            member.num_restarts = 0

    def _update(self, version: str) -> None:
        behind = [server for server in self.servers if self._loaded.get(server) != version or self.check_equal]
        with _paused(self.servers):
            if behind:
                started = time.perf_counter()
                self.transport.send([server.api for server in behind], self.source, version)
                logger.info("weights %s sent to %d servers in %.2f s", version, len(behind), _since(started))
            if self.check_equal:
                verify_equal([server.api for server in behind], self._export(), version)

    def _restart_ended(self) -> bool:
        """Start those servers of ours again that have ended, and wait for them; whether there were any."""
        ended = [server for server in self.servers if not self.is_process_alive(server)]
        for server in ended:
            logger.warning("SGLang server %s has ended; it is started again.", server.api.url)
            self.begin_revival(server)
        for server in ended:
            process = self._members[server].process
            assert process is not None, "only our own are known to have ended"
            process.wait_until_ready(self.start_timeout_s)
        return bool(ended)

    def begin_revival(self, server: Server) -> None:
        member = self._members[server]
        member.deadline = time.monotonic() + self.start_timeout_s
        self.transport.forget()
        folder = self._weights_folder()
        if member.process is None:
            return
        assert self.plan is not None
        assert self.version is not None, "requests are sent after a version is published"
        member.process.kill()
        member.num_restarts += 1
        if member.num_restarts > _MAX_RESTARTS:
            raise member.process.error(f"it was lost {member.num_restarts} times under the same weights.")
        member.process = self.plan.start(member.number, folder, self.version)
        server.api = member.process.api
        self._loaded[server] = self.version

    def is_revived(self, server: Server) -> bool:
        member = self._members[server]
        if time.monotonic() > member.deadline:
            reason = f"it did not come back within {self.start_timeout_s:g} s."
            raise member.process.error(reason) if member.process else server.api.error("/health_generate", reason)
        if member.process is not None:
            if not member.process.is_ready():
                return False
        elif not server.api.is_healthy(timeout_s=2.0):
            return False
        elif server.api.weight_version() != self.version:
            self._update_from_disk(server)
        self._open(server)
        return True

    def is_process_alive(self, server: Server) -> bool:
        process = self._members[server].process
        return process is None or process.is_alive

    def close(self) -> None:
        """End our own servers; those of others go on."""
        self.transport.close([server.api for server in self.servers if server.version is not None])
        for member in self._members.values():
            if member.process is not None:
                member.process.close()

    def _open(self, server: Server) -> None:
        has = server.api.weight_version()
        if has != self.version:
            raise RolloutError(
                f"SGLang server {server.api.url}",
                f"weight version {has}",
                f"it should have version {self.version} now.",
                "Look at its log; nobody else may update its weights.",
            )
        self._loaded[server] = server.version = has

    def _update_from_disk(self, server: Server) -> None:
        assert self.version is not None
        with _paused([server]):
            body = {"model_path": str(self._weights_folder()), "flush_cache": False, "weight_version": self.version}
            server.api.post("/update_weights_from_disk", body, timeout_s=self.start_timeout_s)

    def _weights_folder(self) -> Path:
        """A folder with the current weights."""
        return self.hf_folder.resolve() if self.version == "0" else self._export()

    def _export(self) -> Path:
        """The current weights as an HF folder."""
        if not self._is_exported:
            self.source.export(self.export_folder)
            self._is_exported = True
        return self.export_folder.resolve()


@contextlib.contextmanager
def _paused(servers: list[Server]) -> Iterator[None]:
    """Nothing under way and nothing cached, as updates need it; afterwards requests are admitted again."""
    for server in servers:
        server.api.pause()
    yield
    for server in servers:
        server.api.resume()


def _wait_for_external(server: Server, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not server.api.is_healthy(timeout_s=10.0):
        if time.monotonic() > deadline:
            raise RolloutError(
                "--rollout-external-engine-addrs",
                server.api.url,
                f"no SGLang server answered there within {timeout_s:g} s.",
                "Start the server, or correct the address.",
            )
        time.sleep(1.0)


def _since(started: float) -> float:
    return time.perf_counter() - started
