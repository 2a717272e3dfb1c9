"""What is sent: the trainer's weights under their HF names, in buckets, never as a second full copy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lockstep.checkpoint.hf.shards import Holding
from lockstep.models import LanguageModel, build_model
from lockstep.models.hf_names import hf_tensors
from lockstep.rollout.sglang.api import ServerApi


@dataclass(frozen=True)
class WeightSource:
    """Where the trainer's current weights are had."""

    export: Callable[[Path], None] | None
    """Writes them as an HF folder; only the controller is asked for that."""
    model: Callable[[], AbstractContextManager[LanguageModel]] | None
    """The model itself, or this process's share of it; None in a controller that has none."""
    version: Callable[[], int] | None = None
    """Of the weights that it has now. Default: that which was last asked for."""
    is_at_rest: Callable[[], bool] = lambda: True
    """False while another thread trains, and the weights may not be read."""


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


@dataclass(frozen=True)
class Bucket:
    """HF tensors that travel together, and the stretches of our parameters that hold their numbers one after another.

    The HF tensors of a parameter follow each other in its memory, so that a few copies gather hundreds of them.
    """

    names: list[str]
    dtypes: list[torch.dtype]
    shapes: list[torch.Size]
    ends: list[int]
    """Where each tensor ends, in bytes of the bucket."""
    stretches: list[tuple[nn.Parameter, int, int]]
    """Parameter of the whole model, its first number that is meant, and one past the last."""
    read: Callable[[nn.Parameter], Tensor] = nn.Parameter.detach
    """The numbers of a parameter."""

    def flattened(self) -> Tensor:
        """A copy of all bytes `[bytes]`, one tensor after the other. Of a divided model all ranks ask for it together,
        and all get it."""
        parts = [self.read(p).view(-1)[first:end].view(torch.uint8) for p, first, end in self.stretches]
        return torch.cat(parts)

    @cached_property
    def _listing(self) -> bytes:
        """What is in it, as SGLang reads it from JSON. Written once, as it is the same in every update."""
        dtypes = [str(dtype).removeprefix("torch.") for dtype in self.dtypes]
        return json.dumps({"names": self.names, "dtypes": dtypes, "shapes": self.shapes}).encode()

    def request(self, further: dict[str, Any]) -> bytes:
        """JSON of the listing and of what else a request says."""
        return self._listing[:-1] + b", " + json.dumps(further).encode()[1:]

    @cached_property
    def places(self) -> list[SimpleNamespace]:
        """What lies where in it, as SGLang reads it from a pickle."""
        parts = zip(self.names, self.shapes, self.dtypes, [0, *self.ends], self.ends, strict=False)
        return [
            SimpleNamespace(name=name, shape=shape, dtype=dtype, start_idx=begin, end_idx=end, numel=end - begin)
            for name, shape, dtype, begin, end in parts
        ]


class BucketPlan:
    """The buckets of a model, listed at its first update: to list ten thousand tensors takes longer than to send them.

    Args:
        num_bytes: of a bucket; a tensor that is larger has one of its own.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._model: LanguageModel | None = None
        self._buckets: list[Bucket] = []
        self._gathered: _Gathered | None = None

    def of(self, model: LanguageModel) -> list[Bucket]:
        """Every parameter by its HF names; tied ones once. For one update: call it again for the next."""
        if self._gathered is not None:
            self._gathered.forget()
        if model is not self._model:
            self._model = model
            if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
                self._gathered = None
                self._buckets = list(_buckets(model, self.num_bytes))
            else:
                self._gathered = _Gathered(model)
                whole = _buckets(self._gathered.whole, self.num_bytes)
                self._buckets = [replace(bucket, read=self._gathered) for bucket in whole]
        return self._buckets

    @property
    def num_ranks(self) -> int:
        """Processes that hold the model between them and gather together; rank 0 talks to the servers."""
        return 1 if self._gathered is None else dist.get_world_size()

    @property
    def rank(self) -> int:
        return 0 if self._gathered is None else dist.get_rank()


class _Gathered:
    """Reads parameters of a model that is divided over ranks, all ranks together, in their order.

    `whole` has the shapes of the undivided model, and no numbers.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._like = next(model.parameters())
        with torch.device("meta"):
            self.whole = build_model(model.config).to(self._like.dtype)
        self._names = {parameter: name for name, parameter in self.whole.named_parameters()}
        self._last: tuple[nn.Parameter, Tensor] | None = None

    def __call__(self, parameter: nn.Parameter) -> Tensor:
        """Of one that the next bucket asks for again, the copy that is there."""
        if self._last is None or self._last[0] is not parameter:
            self._last = None  # its memory first
            self._last = parameter, self._gather(self._names[parameter], parameter.shape)
        return self._last[1]

    def forget(self) -> None:
        self._last = None

    def _gather(self, name: str, shape: torch.Size) -> Tensor:
        here = dict(self._model.named_parameters()).get(name)
        gathered = (Holding.of_nothing(shape, self._like) if here is None else Holding(here)).gathered(())
        dist.broadcast(gathered.view(-1).view(torch.uint8), src=0)  # which alone has got it so far
        return gathered


def _buckets(model: LanguageModel, num_bytes: int) -> Iterator[Bucket]:
    bucket = Bucket([], [], [], [], [])
    shapes: dict[torch.Size, torch.Size] = {}
    """Equal ones as one object: pickled, it is written and read once for thousands of tensors."""
    for name, parameter in model.named_parameters():
        stop = 0
        for tensor in hf_tensors(name, parameter.shape):
            part = parameter.detach()[tensor.index]
            assert part.storage_offset() == parameter.storage_offset() + stop, (
                f"{tensor.name} is not where it should be"
            )
            size = bucket.ends[-1] if bucket.ends else 0
            if bucket.names and size + part.nbytes > num_bytes:
                yield bucket
                bucket, size = Bucket([], [], [], [], []), 0
            start, stop = stop, stop + part.numel()
            bucket.names.append(tensor.name)
            bucket.dtypes.append(part.dtype)
            bucket.shapes.append(shapes.setdefault(part.shape, part.shape))
            bucket.ends.append(size + part.nbytes)
            if bucket.stretches and bucket.stretches[-1][0] is parameter:
                start = bucket.stretches.pop()[1]
            bucket.stretches.append((parameter, start, stop))
    yield bucket


def with_version(buckets: Sequence[Bucket], version: str) -> Iterator[tuple[Bucket, dict[str, str]]]:
    """Buckets, the last one with the version: before it is loaded, no server says that it has the weights."""
    for bucket in buckets[:-1]:
        yield bucket, {}
    yield buckets[-1], {"weight_version": version}


class Posts:
    """Posts to all servers at the same time, from threads that last from one post to the next."""

    def __init__(self, servers: Sequence[ServerApi], timeout_s: float) -> None:
        self._servers = servers
        self._timeout_s = timeout_s
        self._pool = ThreadPoolExecutor(len(servers))

    def __enter__(self) -> Posts:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=kind is None)  # what failed may leave a server without an answer

    def __call__(self, path: str, bodies: Sequence[dict[str, Any] | bytes]) -> Callable[[], None]:
        """The result waits for all answers, and raises the first error."""
        posts = [
            self._pool.submit(server.post, path, body, timeout_s=self._timeout_s)
            for server, body in zip(self._servers, bodies, strict=True)
        ]

        def finish() -> None:
            wait(posts)
            for post in posts:
                post.result()

        return finish


def post_to_all(servers: Sequence[ServerApi], path: str, bodies: Sequence[dict[str, Any]], timeout_s: float) -> None:
    """A single post to all servers at the same time; returns when all have answered, or raises the first error."""
    with Posts(servers, timeout_s) as post:
        post(path, bodies)()
