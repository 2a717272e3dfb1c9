"""Ranks on the machines of a Ray cluster: one actor per machine's share, placed together or not at all.

    controller --Ray--> RayNode (one per machine) --starts--> ranks --TCP--> controller

Ray chooses the machines, guards them and starts processes there. What the controller and ranks say to each other does
not pass through it.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import queue
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lockstep.cluster.executor import NodeLost, StartedRank
from lockstep.cluster.ray_node import RayNode, installed_versions
from lockstep.cluster.ray_servers import RayServers
from lockstep.cluster.shared_paths import Expected
from lockstep.cluster.wire import Channel
from lockstep.errors import OptionError, RankError

_TOKEN_BYTES = 32
_PASSED_ON = ("OMP_NUM_THREADS", "PYTHONPATH", "HF_HUB_OFFLINE", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Environment variables of the controller that processes on other machines get too."""
_END_S = 5.0


class RayCluster:
    """A connection to a Ray cluster, or a Ray of our own on this machine, with a run's machines reserved in it.

    Args:
        address: as `--ray-address`.
        shares: ranks of each machine's share; a share lies on one machine.
        device: what ranks compute on, cpu, cuda or auto: GPUs where the cluster has any.
        timeout_s: how long shares may wait until other work on the cluster has ended.
    Raises:
        OptionError: there is no such cluster, or it is too small.
    """

    def __init__(self, address: str | None, shares: Sequence[int], *, device: str, timeout_s: float) -> None:
        needed = sum(shares)
        self.is_ours = _connect(address, needed)
        self._group: Any = None
        self._nodes: list[Any] = []
        try:
            self.device_type = _device_type(device)
            resource = "GPU" if self.device_type == "cuda" else "CPU"
            _require_room(shares, resource)
            bundles = [{"CPU": share, resource: share} for share in shares]
            self._group = placement_group(bundles, strategy="PACK")
            self._wait_for_room(shares, resource, timeout_s)
            actor: Any = ray.remote(RayNode)
            for number, share in enumerate(shares):
                strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=number)
                options = actor.options(
                    num_cpus=share,
                    num_gpus=share if resource == "GPU" else 0,
                    max_concurrency=4,
                    scheduling_strategy=strategy,
                )
                self._nodes.append(options.remote())
            self.addresses: list[str] = self._look()
        except BaseException:
            self.close()
            raise
        self.controller_address: str = ray.util.get_node_ip_address()

    def _look(self) -> list[str]:
        """Addresses of all shares; their environments are the controller's."""
        try:
            seen = ray.get([node.look.remote() for node in self._nodes])
        except RayError as error:
            raise RankError(
                "Ray's nodes",
                str(error).strip().splitlines()[-1],
                "what starts the ranks did not start there.",
                "Install the same Lockstep and Ray on every node.",
            ) from None
        ours = installed_versions()
        for address, theirs in seen:
            for name, found in theirs.items():
                if found != ours[name]:
                    raise OptionError(
                        f"{name} on node {address}",
                        found,
                        f"the controller has {ours[name]}.",
                        "Install the same versions on every node.",
                    )
        return [address for address, _ in seen]

    def require_shared(self, paths: list[Expected]) -> None:
        """Raises OptionError naming the first node that sees a path otherwise than the controller, and the path."""
        seen = ray.get([node.complaints.remote(paths) for node in self._nodes])
        for address, complaints in zip(self.addresses, seen, strict=True):
            for number, text in complaints:
                raise paths[number].error(address, text)

    def processes(self, shares: Sequence[int], what: str) -> RayProcesses:
        """An executor on some of the shares, by their numbers."""
        return RayProcesses(
            [(number, self.addresses[number], self._nodes[number]) for number in shares], self.controller_address, what
        )

    def servers(self, shares: Sequence[int], *, gpus_per_share: int, gpus_per_server: int) -> RayServers:
        """Where SGLang's servers run: on some of the shares, all of one size."""
        return RayServers(
            [(self.addresses[number], self._nodes[number]) for number in shares],
            gpus_per_node=gpus_per_share,
            gpus_per_server=gpus_per_server,
            uses_gpus=self.device_type == "cuda",
            environment=_passed_on(),
        )

    def close(self) -> None:
        """Give back what was reserved; end Ray if it was started here, else only leave it."""
        with contextlib.suppress(RayError):
            for node in self._nodes:
                ray.kill(node)
            if self._group is not None:
                remove_placement_group(self._group)
        ray.shutdown()

    def _wait_for_room(self, shares: Sequence[int], resource: str, timeout_s: float) -> None:
        try:
            ray.get(self._group.ready(), timeout=10.0)
        except GetTimeoutError:
            print("waiting for other work on the Ray cluster to end", file=sys.stderr, flush=True)
        try:
            ray.get(self._group.ready(), timeout=timeout_s)
        except GetTimeoutError:
            raise _too_small(shares, resource, f"they are in use, and were still after {timeout_s:.0f} s") from None


def _passed_on() -> dict[str, str]:
    return {name: os.environ[name] for name in _PASSED_ON if name in os.environ}


class RayProcesses:
    """`Executor` of one group of ranks, in the order of its machines."""

    def __init__(self, nodes: Sequence[tuple[int, str, Any]], controller_address: str, what: str) -> None:
        self._nodes = nodes
        self._controller_address = controller_address
        self._what = what

    def start(self, num_ranks: int, timeout_s: float) -> list[StartedRank]:
        per_node = num_ranks // len(self._nodes)
        token = secrets.token_bytes(_TOKEN_BYTES)
        environment = _passed_on()
        with socket.create_server((self._controller_address, 0), backlog=num_ranks) as server:
            controller = server.getsockname()[:2]
            begun = []
            for place, (_, _, node) in enumerate(self._nodes):
                first = place * per_node
                begun.append(
                    node.start.remote(list(range(first, first + per_node)), controller, token, environment, os.getcwd())
                )
            channels = dict(_accept(server, token, num_ranks, begun, timeout_s))
        started = []
        for place, (number, address, node) in enumerate(self._nodes):
            ranks = range(place * per_node, (place + 1) * per_node)
            processes = {rank: RayProcess(rank, node, channels[rank]) for rank in ranks}
            threading.Thread(target=_follow, args=(node, processes), daemon=True).start()
            for local_rank, rank in enumerate(ranks):
                channel = Channel(channels[rank])
                channels[rank].settimeout(timeout_s)
                name = f"{self._what} {rank} on node {number} ({address})"
                started.append(StartedRank(processes[rank], channel, name, local_rank))
        return started


class RayProcess:
    """A rank's process on another machine, as far as its `RayNode` tells."""

    def __init__(self, rank: int, node: Any, connection: socket.socket) -> None:
        self._rank, self._node, self._connection = rank, node, connection
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._code: int | None = None
        self._lost = ""

    def wait(self, timeout: float) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(f"rank {self._rank}", timeout)
        if self._code is None:
            raise NodeLost(self._lost)
        return self._code

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def kill(self) -> None:
        with contextlib.suppress(RayError):
            self._node.kill.remote(self._rank)

    def lines(self) -> Iterator[bytes]:
        while (line := self._lines.get()) is not None:
            yield line

    def hear(self, news: bytes | int) -> None:
        """A line that it has printed, or its exit code."""
        if isinstance(news, bytes):
            self._lines.put(news)
        else:
            self._code = news
            self._end()

    def lose(self, reason: str) -> None:
        """Its machine is gone; so that the group notices, its channel ends too."""
        if not self._ended.is_set():
            self._lost = reason
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
            self._end()

    def _end(self) -> None:
        self._lines.put(None)
        self._ended.set()


def _follow(node: Any, processes: Mapping[int, RayProcess]) -> None:
    """Tell processes what their node says about them, until it or they are gone."""
    try:
        while not all(process.has_ended for process in processes.values()):
            for rank, news in ray.get(node.news.remote()):
                processes[rank].hear(news)
    except Exception as error:  # RayError, or whatever a Ray that is being shut down raises
        reason = str(error).strip().splitlines()
        for process in processes.values():
            process.lose(f"Ray says: {reason[0] if reason else type(error).__name__}")


def _accept(
    server: socket.socket, token: bytes, count: int, begun: list[Any], timeout_s: float
) -> Iterator[tuple[int, socket.socket]]:
    """The connections of ranks; who does not know the token is turned away."""
    deadline, found = time.monotonic() + timeout_s, 0
    server.settimeout(1.0)
    while found < count:
        try:
            connection, _ = server.accept()
        except TimeoutError:
            ended, _ = ray.wait(begun, num_returns=len(begun), timeout=0)
            ray.get(ended)  # raises what a node could not do
            if time.monotonic() > deadline:
                raise RankError(
                    "ranks",
                    f"{found} of {count}",
                    f"no more of them could reach the controller at {server.getsockname()[0]}.",
                    "Let nodes connect to each other on all ports.",
                ) from None
            continue
        connection.settimeout(_END_S)
        said = b""
        with contextlib.suppress(OSError):
            while len(said) < _TOKEN_BYTES + 4 and (more := connection.recv(_TOKEN_BYTES + 4 - len(said))):
                said += more
        if not hmac.compare_digest(said[:_TOKEN_BYTES], token):
            connection.close()
            continue
        _notice_lost_machines(connection)
        found += 1
        yield int.from_bytes(said[_TOKEN_BYTES:]), connection


def _notice_lost_machines(connection: socket.socket) -> None:
    """Small messages at once; and a machine that has lost its power ends the connection within half a minute."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _connect(address: str | None, needed: int) -> bool:
    """Join the cluster; whether it is one that was started here, for this run."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False, "configure_logging": False}
    if address != "local":
        try:
            ray.init(address=address or "auto", **quiet)
            return False
        except (ConnectionError, RuntimeError) as error:
            if address is not None or "RAY_ADDRESS" in os.environ:
                raise OptionError(
                    "--ray-address" if address else "RAY_ADDRESS",
                    address or os.environ["RAY_ADDRESS"],
                    f"no Ray cluster answers there: {str(error).splitlines()[0]}",
                    "Start one (`lockstep launch` writes the commands), or leave it out for a Ray of this run alone.",
                ) from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    num_cpus = max(needed, os.cpu_count() or 1)
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **quiet)
    return True


def _device_type(device: str) -> str:
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    if device == "cuda" and not has_gpus:
        raise OptionError("--device", device, "the Ray cluster has no GPUs.", "Use --device cpu, or add nodes.")
    return "cuda" if has_gpus and device != "cpu" else "cpu"


def _require_room(shares: Sequence[int], resource: str) -> None:
    """Find out at once what could never be placed, however long one waits."""
    rooms = _rooms(resource)
    if not fits(shares, list(rooms.values())):
        raise _too_small(shares, resource, "the Ray cluster is too small")


def _too_small(shares: Sequence[int], resource: str, why: str) -> OptionError:
    rooms = ", ".join(f"{address}: {room}" for address, room in _rooms(resource).items())
    return OptionError(
        "--actor-num-nodes and --actor-num-gpus-per-node",
        " + ".join(map(str, shares)),
        f"so many {resource}s are needed, each number on one node, and {why} ({rooms or 'no nodes'}).",
        "Add nodes with `ray start`, or ask for less.",
    )


def _rooms(resource: str) -> dict[str, int]:
    """What every living node has."""
    return {
        node["NodeManagerAddress"]: int(node["Resources"].get(resource, 0)) for node in ray.nodes() if node["Alive"]
    }


def fits(shares: Sequence[int], rooms: Sequence[int]) -> bool:
    """Whether shares, each undivided, have room together: the largest first, each where least is left over."""
    left = list(rooms)
    for share in sorted(shares, reverse=True):
        possible = [room for room in left if room >= share]
        if not possible:
            return False
        left.remove(min(possible))
        left.append(min(possible) - share)
    return True
