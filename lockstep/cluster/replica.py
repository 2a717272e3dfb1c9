"""A process with its own copy of the weights, which samples while others train."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from lockstep.checkpoint.hf import read_hf_config
from lockstep.cluster.parts import cache_bytes, embedded_engine, kv_tokens
from lockstep.cluster.rank import take_device
from lockstep.cluster.requests import RequestServer, SamplingProcess
from lockstep.cluster.worker import Place
from lockstep.config import Config
from lockstep.models import build_model, read_model_config
from lockstep.rollout.engine import Generation
from lockstep.weight_sync.copies import CopyReceiver, copies_group


@dataclass(frozen=True)
class ReplicaPlan:
    """Everything a replica needs to know."""

    config: Config
    device_type: str


class Replica(SamplingProcess):
    """A whole model, which gets its numbers from the trainer, and an `EmbeddedEngine` on it."""

    def __init__(self, place: Place, plan: ReplicaPlan) -> None:
        self.place = place
        self.config = plan.config
        self.device = take_device(place, plan.config, plan.device_type)
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one on a Ray node has its node's
        self.dtype = getattr(torch, plan.config.model.params_dtype)
        with torch.device("meta"):
            self.model = build_model(read_model_config(read_hf_config(Path(plan.config.model.hf_checkpoint))))
        self.model = self.model.to(self.dtype).to_empty(device=self.device).requires_grad_(False)
        self.model.tie_weights()
        self._copies: CopyReceiver | None = None

    def open_copies(self, address: tuple[str, int]) -> None:
        """Meet the trainer, which is rank 0, and the other replicas."""
        rank, size = 1 + self.place.rank, 1 + self.place.world_size
        self._copies = CopyReceiver(copies_group(self.config, self.device, address, rank, size))

    def kv_tokens(self, longest: int) -> int:
        """Tokens for which this process has room beside its weights."""
        room = cache_bytes(self.config, self.device, reserved=0)
        size = self.dtype.itemsize
        return kv_tokens(self.config, self.model.config, element_size=size, num_bytes=room, longest=longest)

    def open_engine(self, num_tokens: int, max_context_len: int) -> None:
        engine = embedded_engine(self.config, self.model, num_tokens, max_context_len)
        self._requests = RequestServer(engine, self.place, None)

    def receive_weights(self) -> list[tuple[int, Generation]]:
        """End what is under way, which sampled with the old weights, and take the new ones.

        Returns:
            What has become of requests, by their number.
        """
        assert self._copies is not None, "open_copies comes first"
        ended = self._served.end_all()
        self._copies.receive(self.model.named_parameters())
        return ended

    def begin_sampling(self, version: int) -> None:
        self._served.engine.set_version(version)

    def end_sampling(self) -> None:
        """The copy stays."""
