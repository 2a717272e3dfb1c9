"""Weights broadcast over a process group of the trainer and all ranks of all servers: NCCL on GPUs, gloo on CPUs."""

from __future__ import annotations

import socket
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

from lockstep.errors import RolloutError
from lockstep.rollout.sglang.api import ServerApi
from lockstep.weight_sync.source import Bucket, BucketPlan, Posts, WeightSource, with_version

_dist: Any = dist
_c10d: Any = c10d


class BroadcastTransport:
    """One flat bucket after the other, to all servers at once. The group is made at the first update.

    A request goes out when the one before is answered. SGLang answers when its GPU has been told what to do, so that on
    GPUs requests travel while numbers do. Two requests under way could overtake each other: that a broadcast is over
    does not say that servers have begun with it, as NCCL takes a small bucket into buffers of its own.

    Args:
        backend: "nccl" or "gloo", whichever the weights' device has.
        bucket_bytes: size of a bucket; two are in memory while weights are sent.
        tp_size: ranks of each server.
        host: this machine's address, as the servers see it. Default: that on the way to the first of them.
    """

    def __init__(
        self, *, backend: str, bucket_bytes: int, tp_size: int, timeout_s: float, host: str | None = None
    ) -> None:
        self.backend = backend
        self._plan = BucketPlan(bucket_bytes)
        self.tp_size = tp_size
        self.host = host
        self.timeout_s = timeout_s
        self._group: Any = None
        self._name = ""
        self._members: list[str] = []
        self._store: Any = None

    def send(self, servers: Sequence[ServerApi], source: WeightSource, version: str) -> None:
        assert source.model is not None, "the weights are in this process"
        with source.model() as model:
            buckets = self._plan.of(model)
            flats = (bucket.flattened() for bucket in buckets)
            try:
                if self._plan.rank == 0:
                    with Posts(servers, self.timeout_s) as post:
                        self._meet(servers, post)
                        self._send(post, len(servers), buckets, flats, version)
            finally:
                deque(flats, maxlen=0)  # ranks gather together to the end, whatever became of the servers

    def _send(
        self, post: Posts, num_servers: int, buckets: Sequence[Bucket], flats: Iterator[Tensor], version: str
    ) -> None:
        common = {"group_name": self._name, "load_format": "flattened_bucket", "flush_cache": False}
        flat = next(flats)
        for bucket, last in with_version(buckets, version):
            finish = post("/update_weights_from_distributed", [bucket.request(common | last)] * num_servers)
            with self._failing_by_name():
                work = self._group.broadcast(flat, 0)
                following = next(flats, flat)  # while this one travels, the next is gathered
                work.wait()
            finish()
            flat = following

    def forget(self) -> None:
        if self._group is not None:
            _c10d._abort_process_group(self._group)  # to end it politely would wait for members that are gone
        self._group = self._store = None
        self._members = []

    def close(self, servers: Sequence[ServerApi]) -> None:
        members = [server for server in servers if server.url in self._members]
        for server in members:
            with suppress(RolloutError):  # it may be gone already, and its group with it
                server.post("/destroy_weights_update_group", {"group_name": self._name}, timeout_s=10.0)
        self.forget()

    def _meet(self, servers: Sequence[ServerApi], post: Posts) -> None:
        urls = [server.url for server in servers]
        if self._group is not None and urls == self._members:
            return
        self.close(servers)
        self._name = f"lockstep-{uuid.uuid4().hex[:8]}"
        timeout = timedelta(seconds=self.timeout_s)
        host = self.host or own_address(servers)
        self._store = _dist.TCPStore(host, 0, None, is_master=True, wait_for_workers=False, timeout=timeout)
        world_size = 1 + self.tp_size * len(servers)
        bodies = [
            {
                "master_address": host,
                "master_port": self._store.port,
                "rank_offset": 1 + self.tp_size * number,
                "world_size": world_size,
                "group_name": self._name,
                "backend": self.backend,
            }
            for number in range(len(servers))
        ]
        finish = post("/init_weights_update_group", bodies)
        # Servers join by the same call of torch's: names of keys in the store are its own.
        self._group, _ = _c10d._new_process_group_helper(
            world_size,
            0,
            [],
            _c10d.Backend(self.backend),
            _c10d.PrefixStore(self._name, self._store),
            group_name=self._name,
            timeout=timeout,
        )
        _c10d._world.pg_group_ranks[self._group] = {rank: rank for rank in range(world_size)}  # torch's profiler asks
        finish()
        self._members = urls

    @contextmanager
    def _failing_by_name(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.forget()
            raise RolloutError(
                "--update-weight-transport",
                "nccl",
                f"the broadcast to the servers failed: {str(error)[:500]}",
                "Look at the servers' logs; disk needs no connection between processes.",
            ) from error


def own_address(servers: Sequence[ServerApi]) -> str:
    """This machine's address on the way to the first of them."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((urlsplit(servers[0].url).hostname, 9))
        address: str = probe.getsockname()[0]
        return address
