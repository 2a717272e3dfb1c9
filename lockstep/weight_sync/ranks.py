"""Weights of a trainer that is divided over processes: the ranks gather them, and rank 0 talks to the servers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from lockstep.models import LanguageModel
from lockstep.rollout.sglang.api import ServerApi
from lockstep.weight_sync.broadcast import BroadcastTransport
from lockstep.weight_sync.source import Transport, WeightSource
from lockstep.weight_sync.tensor import TensorTransport


@dataclass(frozen=True)
class TransportPlan:
    """A transport that is made where the weights are.

    Args:
        backend: of a broadcast, "nccl" or "gloo".
        tp_size: ranks of each server.
    """

    kind: Literal["tensor", "nccl"]
    backend: str
    bucket_bytes: int
    tp_size: int
    timeout_s: float

    def make(self) -> Transport:
        if self.kind == "tensor":
            return TensorTransport(bucket_bytes=self.bucket_bytes, tp_size=self.tp_size, timeout_s=self.timeout_s)
        return BroadcastTransport(
            backend=self.backend, bucket_bytes=self.bucket_bytes, tp_size=self.tp_size, timeout_s=self.timeout_s
        )


class Ranks(Protocol):
    """The processes that hold a model between them; each has a `RankWeights` behind `weights`."""

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """The same call on all of them together."""
        ...


class RankWeights:
    """What one rank does to bring the weights to servers; all ranks are told the same at the same time."""

    def __init__(self, model: Callable[[], LanguageModel]) -> None:
        self._source = WeightSource(export=None, model=lambda: nullcontext(model()))
        self._transport: Transport | None = None

    def do(self, what: str, *arguments: Any) -> None:
        getattr(self, what)(*arguments)

    def send(self, plan: TransportPlan, servers: Sequence[ServerApi], version: str) -> None:
        if self._transport is None:
            self._transport = plan.make()
        self._transport.send(servers, self._source, version)

    def forget(self) -> None:
        if self._transport is not None:
            self._transport.forget()

    def close(self, servers: Sequence[ServerApi]) -> None:
        if self._transport is not None:
            self._transport.close(servers)

    def free_memory(self) -> None:
        """Give back what only lies in reserve on the GPU."""
        torch.cuda.empty_cache()


class RanksTransport:
    """A `Transport` as the controller sees it, which has no weights itself."""

    def __init__(self, ranks: Ranks, plan: TransportPlan) -> None:
        self._ranks = ranks
        self._plan = plan

    def send(self, servers: Sequence[ServerApi], source: WeightSource, version: str) -> None:
        self._ranks.call("weights", "send", self._plan, list(servers), version)

    def forget(self) -> None:
        self._ranks.call("weights", "forget")

    def close(self, servers: Sequence[ServerApi]) -> None:
        self._ranks.call("weights", "close", list(servers))
