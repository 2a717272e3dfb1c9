"""Weights for processes that keep a whole copy of the model: broadcast from rank 0, NCCL on GPUs and gloo on CPUs.

All sides list the same parameters in the same order, so nothing but numbers travels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.config import Config

_dist: Any = dist
_BUCKET_BYTES = 256 * 2**20


def copies_group(config: Config, device: torch.device, address: tuple[str, int], rank: int, world_size: int) -> Any:
    """A process group of its own for weights; returns when all its members are there.

    Args:
        address: of the store where they meet.
    """
    timeout = timedelta(minutes=config.cluster.distributed_timeout_minutes)
    host, port = address
    store = _dist.PrefixStore("copies", _dist.TCPStore(host, port, is_master=False, timeout=timeout))
    if device.type == "cpu":
        group = _dist.ProcessGroupGloo(store, rank, world_size, timeout)
    else:
        options = _dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        group = _dist.ProcessGroupNCCL(store, rank, world_size, options)
    return group


class CopySender:
    def __init__(self, group: Any) -> None:
        self._group = group

    def send(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        for bucket in _buckets(tensor.detach() for _, tensor in parameters):
            flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in bucket])
            self._group.broadcast(flat, 0).wait()
            if flat.is_cuda:
                torch.cuda.current_stream().synchronize()  # the next bucket reuses this memory


class CopyReceiver:
    def __init__(self, group: Any) -> None:
        self._group = group

    def receive(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Overwrite the parameters, in place."""
        for bucket in _buckets(tensor.detach() for _, tensor in parameters):
            sizes = [tensor.nbytes for tensor in bucket]
            flat = torch.empty(sum(sizes), dtype=torch.uint8, device=bucket[0].device)
            self._group.broadcast(flat, 0).wait()
            for tensor, part in zip(bucket, flat.split(sizes), strict=True):
                tensor.copy_(part.view(tensor.dtype).view(tensor.shape))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in order, so many that they first exceed the size of a bucket: alike on all sides."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        bucket.append(tensor)
        size += tensor.nbytes
        if size >= _BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
