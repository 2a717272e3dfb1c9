"""Weights broadcast over a process group of the trainer and all ranks of all servers: NCCL on GPUs, gloo on CPUs."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from lockstep.errors import RolloutError
from lockstep.rollout.sglang.api import ServerApi
from lockstep.weight_sync.source import WeightSource, buckets, flattened, hf_weights, post_to_all, with_version

_dist: Any = dist
_c10d: Any = c10d


class BroadcastTransport:
    """One flat bucket after the other, to all servers at once. The group is made at the first update.

    Args:
        backend: "nccl" or "gloo", whichever the weights' device has.
        tp_size: ranks of each server.
        host: this machine's address, as the servers see it.
    """

    def __init__(self, *, backend: str, bucket_bytes: int, tp_size: int, host: str, timeout_s: float) -> None:
        self.backend = backend
        self.bucket_bytes = bucket_bytes
        self.tp_size = tp_size
        self.host = host
        self.timeout_s = timeout_s
        self._group: Any = None
        self._name = ""
        self._members: list[str] = []
        self._store: Any = None

    def send(self, servers: Sequence[ServerApi], source: WeightSource, version: str) -> None:
        assert source.model is not None, "the model is in this process"
        self._meet(servers)
        with source.model() as model:
            for bucket, last in with_version(buckets(hf_weights(model), self.bucket_bytes), version):
                body = {
                    "names": [name for name, _ in bucket],
                    "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
                    "shapes": [list(tensor.shape) for _, tensor in bucket],
                    "group_name": self._name,
                    "load_format": "flattened_bucket",
                    "flush_cache": False,
                } | last
                finish = post_to_all(servers, "/update_weights_from_distributed", [body] * len(servers), self.timeout_s)
                self._broadcast(bucket)
                finish()

    def forget(self) -> None:
        self._group = self._store = None
        self._members = []

    def close(self, servers: Sequence[ServerApi]) -> None:
        members = [server for server in servers if server.url in self._members]
        for server in members:
            with suppress(RolloutError):  # it may be gone already, and its group with it
                server.post("/destroy_weights_update_group", {"group_name": self._name}, timeout_s=10.0)
        self.forget()

    def _meet(self, servers: Sequence[ServerApi]) -> None:
        urls = [server.url for server in servers]
        if self._group is not None and urls == self._members:
            return
        self.close(servers)
        self._name = f"lockstep-{uuid.uuid4().hex[:8]}"
        timeout = timedelta(seconds=self.timeout_s)
        self._store = _dist.TCPStore(self.host, 0, None, is_master=True, wait_for_workers=False, timeout=timeout)
        world_size = 1 + self.tp_size * len(servers)
        bodies = [
            {
                "master_address": self.host,
                "master_port": self._store.port,
                "rank_offset": 1 + self.tp_size * number,
                "world_size": world_size,
                "group_name": self._name,
                "backend": self.backend,
            }
            for number in range(len(servers))
        ]
        finish = post_to_all(servers, "/init_weights_update_group", bodies, self.timeout_s)
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
        finish()
        self._members = urls

    def _broadcast(self, bucket: list[Any]) -> None:
        try:
            self._group.broadcast(flattened(bucket), 0).wait()
        except RuntimeError as error:
            self.forget()
            raise RolloutError(
                "--update-weight-transport",
                "nccl",
                f"the broadcast to the servers failed: {str(error)[:500]}",
                "Look at the servers' logs; disk needs no connection between processes.",
            ) from error


def own_address(servers: Sequence[str]) -> str:
    """This machine's address on the way to the first of these hosts."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((servers[0], 9))
        address: str = probe.getsockname()[0]
        return address
