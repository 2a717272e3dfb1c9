"""What is sent: the trainer's weights under their HF names, in buckets, never as a second full copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lockstep.models import LanguageModel
from lockstep.models.hf_names import hf_tensors
from lockstep.rollout.sglang.api import ServerApi

NamedTensors = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class WeightSource:
    """Where the trainer's current weights are had."""

    export: Callable[[Path], None]
    """Writes them as an HF folder."""
    model: Callable[[], AbstractContextManager[LanguageModel]] | None
    """The model itself, where it is in this process."""


class Transport(Protocol):
    """Brings weights to servers that are paused and hold no cache."""

    def send(self, servers: Sequence[ServerApi], source: WeightSource, version: str) -> None:
        """Return when all servers have them, and say so by their weight version.

        Raises:
            RolloutError: a server refused, or did not answer in time.
        """
        ...

    def forget(self) -> None:
        """A server was lost: what ties the servers together is not to be used again."""
        ...

    def close(self, servers: Sequence[ServerApi]) -> None: ...


def hf_weights(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by its HF names, as views; tied ones once."""
    for name, parameter in model.named_parameters():
        for tensor in hf_tensors(name, parameter.shape):
            yield tensor.name, parameter.detach()[tensor.index]


def buckets(tensors: NamedTensors, num_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """The tensors in lists of up to `num_bytes`; one that is larger has a list of its own."""
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > num_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


def flattened(bucket: list[tuple[str, Tensor]]) -> Tensor:
    """All bytes of a bucket `[bytes]`, one tensor after the other."""
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for _, tensor in bucket])


def with_version(items: Iterable[list[tuple[str, Tensor]]], version: str) -> Iterator[tuple[Any, dict[str, str]]]:
    """Buckets, the last one with the version: before it is loaded, no server says that it has the weights."""
    held: list[tuple[str, Tensor]] | None = None
    for item in items:
        if held is not None:
            yield held, {}
        held = item
    if held is not None:
        yield held, {"weight_version": version}


def post_to_all(
    servers: Sequence[ServerApi], path: str, bodies: Sequence[dict[str, Any]], timeout_s: float
) -> Callable[[], None]:
    """Post to all servers at the same time; the answer waits for theirs, and raises the first error."""
    pool = ThreadPoolExecutor(len(servers))
    posts = [
        pool.submit(server.post, path, body, timeout_s=timeout_s) for server, body in zip(servers, bodies, strict=True)
    ]

    def finish() -> None:
        pool.shutdown(wait=True)
        for post in posts:
            post.result()

    return finish
