"""The servers of a run: started or found by address, given every new version of the weights, and brought back."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lockstep.errors import RolloutError
from lockstep.rollout.sglang.api import ServerApi
from lockstep.rollout.sglang.engine import Server
from lockstep.rollout.sglang.process import RunningServer, ServerPlaces
from lockstep.weight_sync import Transport, WeightSource, verify_equal

logger = logging.getLogger(__name__)

_MAX_RESTARTS = 3
"""Of one server between two updates of all."""
_WEIGHTS = ("weights",)
_OTHER_MEMORY = ("kv_cache", "cuda_graph")
"""SGLang's names for what lies in a server's memory; these are needed only when requests come."""


@dataclass(frozen=True)
class ServerPlan:
    """How our own servers are started."""

    python: str
    words: list[str]
    """Arguments of every server, without model and address."""
    num_servers: int
    log_folder: Path
    places: ServerPlaces

    def start(self, number: int, model: Path, version: str) -> RunningServer:
        log = self.log_folder / f"server-{number}.log"
        return self.places.start(number, python=self.python, words=self.words, model=model, version=version, log=log)


@dataclass
class _Member:
    """A server, its process if it is ours, and its way back when it is lost."""

    number: int
    server: Server
    process: RunningServer | None
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
        health_timeout_s: what a server gets to show that it lives, when an update has failed.
        free_memory: for servers that share training's GPUs: makes training give back what it only keeps in reserve.
            With it, `release` takes the servers' memory away until the next `publish`.
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
        health_timeout_s: float = 30.0,
        free_memory: Callable[[], None] | None = None,
    ) -> None:
        self.plan = plan
        self.source = source
        self.transport = transport
        self.hf_folder = hf_folder
        self.export_folder = export_folder
        self.start_timeout_s = start_timeout_s
        self.check_equal = check_equal
        self.health_timeout_s = health_timeout_s
        self.free_memory = free_memory
        self.version: str | None = None
        """What `publish` was last asked for."""
        self._exported: str | None = None
        """The version of which there is an export."""
        self._loaded: dict[Server, str] = {}
        """What the servers have, as far as we know."""
        self._released: dict[tuple[str, ...], set[Server]] = {_WEIGHTS: set(), _OTHER_MEMORY: set()}
        """Those that have given such memory back."""
        self._reviving: set[Server] = set()
        """Those that are on their way back, and get the newest weights when they are there."""
        self._members: dict[Server, _Member] = {}
        for number in range(plan.num_servers if plan is not None else 0):
            assert plan is not None
            process = plan.start(number, hf_folder, "0")
            self._add(_Member(number, Server(process.api), process))
            self._loaded[self.servers[-1]] = "0"
        for number, address in enumerate(addresses):
            url = address if "://" in address else f"http://{address}"
            self._add(_Member(number, Server(ServerApi(url.rstrip("/"), number)), None))

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

        A server of ours that has ended or hangs, before or during the update, is started again from these weights.
        Servers that are on their way back get them there.

        Raises:
            RolloutError: a server cannot be updated.
        """
        self.version = str(version)
        for server in self.servers:
            server.version = None
        self._restart(server for server in self._present if not self.is_process_alive(server))
        try:
            self._update(self.version)
        except RolloutError as error:
            lost = [server for server in self._present if not self._is_responsive(server)]
            if not lost or any(self._members[server].process is None for server in lost):
                raise
            logger.warning("An update of the weights failed and is repeated: %s", error)
            self._restart(lost)
            self._update(self.version)
        for server in self._present:
            self._open(server, self.version)
            self._members[server].num_restarts = 0

    def release(self) -> None:
        if self.free_memory is None:
            return
        started = time.perf_counter()
        for server in self._present:
            if server.version is None:
                continue
            server.version = None
            self._loaded.pop(server, None)
            for servers in self._released.values():
                servers.add(server)
            try:
                server.api.release_memory(_WEIGHTS + _OTHER_MEMORY)
            except RolloutError as error:
                logger.warning("SGLang server lost: %s", error)
                self.end(server)
        logger.info("memory of %d servers released in %.2f s", len(self._released[_WEIGHTS]), _since(started))

    @property
    def _present(self) -> list[Server]:
        return [server for server in self._members if server not in self._reviving]

    def _update(self, version: str) -> None:
        behind = [server for server in self._present if self._loaded.get(server) != version or self.check_equal]
        self._resume(_WEIGHTS)
        with _paused(self._present, self.health_timeout_s):
            if behind:
                started = time.perf_counter()
                self.transport.send([server.api for server in behind], self.source, version)
                logger.info("weights %s sent to %d servers in %.2f s", version, len(behind), _since(started))
            if self.check_equal:
                verify_equal([server.api for server in behind], self._export(version), version)
            self._resume(_OTHER_MEMORY)

    def _resume(self, tags: tuple[str, ...]) -> None:
        """Have it taken again, when training has given back what it only keeps in reserve, buckets of weights too; to
        ask a server for what it has kills it."""
        released = self._released[tags]
        if released and self.free_memory is not None:
            self.free_memory()
        while released:
            released.pop().api.resume_memory(tags)

    def _restart(self, servers: Iterable[Server]) -> None:
        """Start servers of ours again, and wait for them."""
        lost = list(servers)
        for server in lost:
            logger.warning("SGLang server %s has ended or hangs; it is started again.", server.api.url)
            self.begin_revival(server)
        for server in lost:
            process = self._members[server].process
            assert process is not None, "only our own are started again"
            process.wait_until_ready(self.start_timeout_s)
            self._reviving.discard(server)

    def _is_responsive(self, server: Server) -> bool:
        return self.is_process_alive(server) and server.api.is_responsive(self.health_timeout_s)

    def end(self, server: Server) -> None:
        process = self._members[server].process
        if process is None:
            raise server.api.error("", "it does not answer, and is not ours to start again.")
        process.kill()

    def begin_revival(self, server: Server) -> None:
        member = self._members[server]
        member.deadline = time.monotonic() + self.start_timeout_s
        self.transport.forget()
        self._reviving.add(server)
        for servers in self._released.values():
            servers.discard(server)
        if member.process is None:
            return
        assert self.plan is not None
        version = self._newest()
        folder = self._weights_folder(version)
        member.process.kill()
        member.num_restarts += 1
        if member.num_restarts > _MAX_RESTARTS:
            raise member.process.error(f"it was lost {member.num_restarts} times under the same weights.")
        member.process = self.plan.start(member.number, folder, version)
        server.api = member.process.api
        self._loaded[server] = version

    def is_revived(self, server: Server) -> bool:
        member = self._members[server]
        if time.monotonic() > member.deadline:
            reason = f"it did not come back within {self.start_timeout_s:g} s."
            raise member.process.error(reason) if member.process else server.api.error("/health_generate", reason)
        if member.process is not None:
            return member.process.is_ready()
        return server.api.is_healthy(timeout_s=self.health_timeout_s)

    def admit(self, server: Server) -> None:
        version = self._newest()
        if server.api.weight_version() != version:
            with _paused([server], self.health_timeout_s):
                folder = str(self._weights_folder(version))
                body = {"model_path": folder, "flush_cache": False, "weight_version": version}
                server.api.post("/update_weights_from_disk", body, timeout_s=self.start_timeout_s)
        self._reviving.discard(server)
        self._open(server, version)

    @property
    def is_at_rest(self) -> bool:
        return self.source.is_at_rest()

    def _newest(self) -> str:
        """The version that training has by now: it may be ahead of the one that was last published."""
        assert self.version is not None, "requests are sent after a version is published"
        return self.version if self.source.version is None else str(self.source.version())

    def is_process_alive(self, server: Server) -> bool:
        process = self._members[server].process
        return process is None or process.is_alive

    def close(self) -> None:
        """End our own servers; those of others go on."""
        self.transport.close([server.api for server in self.servers if server.version is not None])
        processes = [member.process for member in self._members.values() if member.process is not None]
        for process in processes:
            process.terminate()
        for process in processes:
            process.close()

    def _open(self, server: Server, version: str) -> None:
        """Send it requests from now on."""
        has = server.api.weight_version()
        if has != version:
            raise RolloutError(
                f"SGLang server {server.api.url}",
                f"weight version {has}",
                f"it should have version {version} now.",
                "Look at its log; nobody else may update its weights.",
            )
        self._loaded[server] = server.version = has

    def _weights_folder(self, version: str) -> Path:
        """A folder with the weights that training has now."""
        return self.hf_folder.resolve() if version == "0" else self._export(version)

    def _export(self, version: str) -> Path:
        """The weights that training has now, as an HF folder."""
        if self._exported != version:
            assert self.source.export is not None, "this is the controller"
            self._exported = None
            self.source.export(self.export_folder)
            self._exported = version
        return self.export_folder.resolve()


@contextlib.contextmanager
def _paused(servers: list[Server], timeout_s: float) -> Iterator[None]:
    """Nothing under way and nothing cached, as updates need it; afterwards requests are admitted again."""
    for server in servers:
        server.api.pause(timeout_s)
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
