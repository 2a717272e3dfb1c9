"""Weights as tensors in shared memory: CPU memory, or a GPU's by CUDA IPC. The servers are on this machine."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import reductions

from lockstep.errors import RolloutError
from lockstep.rollout.sglang.api import ServerApi
from lockstep.weight_sync.source import (
    Bucket,
    BucketPlan,
    WeightSource,
    post_to_all,
    with_version,
)

_DEVICE = 6
"""Where torch's recipe for a tensor of another process names the device."""


class TensorTransport:
    """One flat bucket after the other; a server has loaded it when it answers, and only then its memory is freed.

    Args:
        bucket_bytes: size of a bucket. Two are in memory: while servers load one, the next is gathered.
        tp_size: ranks of each server; each gets the whole bucket and takes its part.
    """

    def __init__(self, *, bucket_bytes: int, tp_size: int, timeout_s: float) -> None:
        self._plan = BucketPlan(bucket_bytes)
        self.tp_size = tp_size
        self.timeout_s = timeout_s

    def send(self, servers: Sequence[ServerApi], source: WeightSource, version: str) -> None:
        assert source.model is not None, "the weights are in this process"
        failure: RolloutError | None = None
        finish: Callable[[], None] | None = None
        with source.model() as model:
            for bucket, last in with_version(self._plan.of(model), version):
                flat = bucket.flattened()  # while servers load the one before
                failure = failure or _failure_of(finish)
                handles = self._handles(servers, bucket, flat)
                finish, held = None, flat  # no server reads the one before any more: its memory is free
                if self._plan.rank == 0 and failure is None:
                    common = {"load_format": "flattened_bucket", "flush_cache": False} | last
                    bodies = [common | {"serialized_named_tensors": handles[server.url]} for server in servers]
                    finish = post_to_all(servers, "/update_weights_from_tensor", bodies, self.timeout_s)
        failure = failure or _failure_of(finish)
        if self._plan.num_ranks > 1:
            dist.barrier()
        del held
        if failure is not None:
            raise failure

    def _handles(self, servers: Sequence[ServerApi], bucket: Bucket, flat: Tensor) -> dict[str, list[str]]:
        """By server, one for each of its ranks, as a handle counts whoever opens it.

        Servers that share training's GPUs get memory of the rank that has the same GPU.
        """
        places = {
            server.url: range(server.number * self.tp_size, (server.number + 1) * self.tp_size) for server in servers
        }
        rank, size = self._plan.rank, self._plan.num_ranks
        pickler = _GpuPickler if flat.is_cuda and size > 1 else ForkingPickler
        here = (place for part in places.values() for place in part if place % size == rank)
        own = {place: _serialized(bucket, flat, pickler) for place in here}
        everybodys: list[dict[int, str]] = [own]
        if size > 1:
            everybodys = [{}] * size
            dist.all_gather_object(everybodys, own)
        return {url: [everybodys[place % size][place] for place in part] for url, part in places.items()}

    def forget(self) -> None:
        """Nothing ties the servers together."""

    def close(self, servers: Sequence[ServerApi]) -> None:
        """Nothing is left open."""


def _serialized(bucket: Bucket, flat: Tensor, pickler: type[ForkingPickler]) -> str:
    """A handle of `flat`, and where each tensor lies in it, as SGLang unpickles it."""
    parts = zip(bucket.names, bucket.shapes, bucket.dtypes, [0, *bucket.ends], bucket.ends, strict=False)
    metadata = [
        SimpleNamespace(name=name, shape=shape, dtype=dtype, start_idx=begin, end_idx=end, numel=end - begin)
        for name, shape, dtype, begin, end in parts
    ]
    buffer = io.BytesIO()
    with _files_share_memory():
        pickler(buffer).dump({"flattened_tensor": flat, "metadata": metadata})
    return base64.b64encode(buffer.getvalue()).decode()


class _GpuPickler(ForkingPickler):
    """Names a GPU by its UUID, as SGLang does: its number is another one in a process that sees others."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return NotImplemented
        rebuild, arguments = reductions.reduce_tensor(obj)
        uuid = str(torch.cuda.get_device_properties(obj.device).uuid)
        return rebuild, (*arguments[:_DEVICE], uuid, *arguments[_DEVICE + 1 :])


def _failure_of(finish: Callable[[], None] | None) -> RolloutError | None:
    """Wait for what is under way. Ranks gather together to the end, so an error is raised only after that."""
    try:
        if finish is not None:
            finish()
    except RolloutError as error:
        return error
    return None


@contextmanager
def _files_share_memory() -> Iterator[None]:
    """Shared memory goes by a file's name: a server is no child of this process and cannot inherit descriptors."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
