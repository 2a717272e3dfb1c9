"""Weights as tensors in shared memory: CPU memory, or a GPU's by CUDA IPC. The servers are on this machine."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import torch
from torch import Tensor

from lockstep.rollout.sglang.api import ServerApi
from lockstep.weight_sync.source import WeightSource, buckets, flattened, hf_weights, post_to_all, with_version


class TensorTransport:
    """One flat bucket after the other; a server has loaded it when it answers, and only then its memory is freed.

    Args:
        bucket_bytes: size of a bucket, which is what an update takes beside the weights.
        tp_size: ranks of each server; each gets the whole bucket and takes its part.
    """

    def __init__(self, *, bucket_bytes: int, tp_size: int, timeout_s: float) -> None:
        self.bucket_bytes = bucket_bytes
        self.tp_size = tp_size
        self.timeout_s = timeout_s

    def send(self, servers: Sequence[ServerApi], source: WeightSource, version: str) -> None:
        assert source.model is not None, "the model is in this process"
        with source.model() as model:
            for bucket, last in with_version(buckets(hf_weights(model), self.bucket_bytes), version):
                flat = flattened(bucket)
                body = {
                    "serialized_named_tensors": [_serialized(bucket, flat)] * self.tp_size,
                    "load_format": "flattened_bucket",
                    "flush_cache": False,
                } | last
                post_to_all(servers, "/update_weights_from_tensor", [body] * len(servers), self.timeout_s)()
                del flat

    def forget(self) -> None:
        """Nothing ties the servers together."""

    def close(self, servers: Sequence[ServerApi]) -> None:
        """Nothing is left open."""


def _serialized(bucket: list[tuple[str, Tensor]], flat: Tensor) -> str:
    """A handle of `flat`, and where each tensor lies in it, as SGLang unpickles it."""
    metadata, begin = [], 0
    for name, tensor in bucket:
        end = begin + tensor.nbytes
        metadata.append(
            SimpleNamespace(
                name=name,
                shape=tensor.shape,
                dtype=tensor.dtype,
                start_idx=begin,
                end_idx=end,
                numel=tensor.nbytes,
            )
        )
        begin = end
    buffer = io.BytesIO()
    with _files_share_memory():
        ForkingPickler(buffer).dump({"flattened_tensor": flat, "metadata": metadata})
    return base64.b64encode(buffer.getvalue()).decode()


@contextmanager
def _files_share_memory() -> Iterator[None]:
    """Shared memory goes by a file's name: a server is no child of this process and cannot inherit descriptors."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
