"""Weights as tensors in shared memory: CPU memory, or a GPU's by CUDA IPC. The servers are on this machine."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import reductions

from lockstep.errors import RolloutError
from lockstep.rollout.sglang.api import ServerApi
from lockstep.weight_sync.source import Bucket, BucketPlan, Posts, WeightSource, with_version

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
        with Posts(servers, self.timeout_s) as post, source.model() as model:
            for bucket, last in with_version(self._plan.of(model), version):
                flat = bucket.flattened()  # while servers load the one before
                own = self._own_handles(servers, bucket, flat)
                failure = _failure_of(finish)
                has_failed, handles = self._together(failure is not None, own)
                held = flat  # no server reads the one before any more: its memory is free
                if has_failed:
                    break
                if self._plan.rank == 0:
                    common = {"load_format": "flattened_bucket", "flush_cache": False} | last
                    named = ([handles[place] for place in self._places(server)] for server in servers)
                    bodies = [common | {"serialized_named_tensors": tensors} for tensors in named]
                    finish = post("/update_weights_from_tensor", bodies)
            failure = failure or _failure_of(finish)
        if self._plan.num_ranks > 1:
            dist.barrier()
        del held
        if failure is not None:
            raise failure

    def _own_handles(self, servers: Sequence[ServerApi], bucket: Bucket, flat: Tensor) -> dict[int, str]:
        """Those of this rank, one for each rank of a server that is to open it, as a handle counts who does.

        Servers that share training's GPUs get memory of the rank that has the same GPU.
        """
        rank, size = self._plan.rank, self._plan.num_ranks
        pickler = _GpuPickler if flat.is_cuda and size > 1 else ForkingPickler
        here = (place for server in servers for place in self._places(server) if place % size == rank)
        return {place: _serialized(bucket, flat, pickler) for place in here}

    def _together(self, has_failed: bool, own: dict[int, str]) -> tuple[bool, dict[int, str]]:
        """What rank 0 knows of the bucket before, and the handles of all ranks of ours. A handle that no server opens
        keeps its memory for good, so ranks that hear of a failure make no more of them."""
        said = [(has_failed, own)]
        if self._plan.num_ranks > 1:
            said *= self._plan.num_ranks
            dist.all_gather_object(said, (has_failed, own))
        return said[0][0], {place: handle for _, handles in said for place, handle in handles.items()}

    def _places(self, server: ServerApi) -> range:
        """Its ranks among those of all servers."""
        return range(server.number * self.tp_size, (server.number + 1) * self.tp_size)

    def forget(self) -> None:
        """Nothing ties the servers together."""

    def close(self, servers: Sequence[ServerApi]) -> None:
        """Nothing is left open."""


def _serialized(bucket: Bucket, flat: Tensor, pickler: type[ForkingPickler]) -> str:
    """A handle of `flat`, and where each tensor lies in it, as SGLang unpickles it."""
    buffer = io.BytesIO()
    with _files_share_memory():
        pickler(buffer).dump({"flattened_tensor": flat, "metadata": bucket.places})
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
    """Wait for what is under way. Ranks gather together, so an error is raised when all of them have stopped."""
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
