"""What one rank holds, and what the controller may ask of it. All ranks are asked the same, at the same time."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from lockstep.checkpoint.hf import OnBytes, read_hf_config, save_hf_model
from lockstep.cluster.parts import (
    cache_bytes,
    embedded_engine,
    kv_tokens,
    layout_of,
    reference_folder,
    trainer_options,
    weights_filler,
)
from lockstep.cluster.requests import RequestServer, SamplingProcess
from lockstep.cluster.worker import Place
from lockstep.config import Config
from lockstep.models import LanguageModel, build_model, read_model_config
from lockstep.parallel.decode import Peers
from lockstep.parallel.mesh import Meshes
from lockstep.parallel.shard import shard_model
from lockstep.parallel.whole import whole
from lockstep.trainer.batch import TrainSample
from lockstep.trainer.engine import LogProbs, StepResult
from lockstep.trainer.parallel import ParallelTrainer
from lockstep.weight_sync.copies import CopySender, copies_group
from lockstep.weight_sync.ranks import RankWeights

T = TypeVar("T")
_dist: Any = dist  # TCPStore is not among its declared names


@dataclass(frozen=True)
class RankPlan:
    """Everything a rank needs to know."""

    config: Config
    device_type: str
    num_steps: int
    rendezvous: tuple[str, int]
    """Address and port of the store where ranks meet."""


class Rank(SamplingProcess):
    """A `ParallelTrainer`, and an `EmbeddedEngine` once it is opened."""

    def __init__(self, place: Place, plan: RankPlan) -> None:
        self.place = place
        self.config = plan.config
        self.device = take_device(place, plan.config, plan.device_type)
        _join(place, plan)
        layout = layout_of(plan.config)
        self.meshes = Meshes(layout, plan.device_type)
        self.dtype = getattr(torch, plan.config.model.params_dtype)
        model = self._load(Path(plan.config.model.hf_checkpoint), self._reporter("loading"))
        reference = None
        if (folder := reference_folder(plan.config)) is not None:
            reference = self._load(folder, self._reporter("loading the reference")).requires_grad_(False)
        self.trainer = ParallelTrainer(
            model,
            self.meshes,
            reference=reference,
            device=self.device,
            on_micro_batch=self._on_micro_batch,
            **trainer_options(plan.config, plan.num_steps),
        )
        self._weights = contextlib.ExitStack()
        self._copies: CopySender | None = None
        self._weights_for_servers = RankWeights(lambda: self.trainer.model)

    # Training

    def log_probs(
        self, samples: list[TrainSample], reference: bool
    ) -> tuple[list[LogProbs], list[np.ndarray | None] | None] | None:
        """Results, and the experts that the samples have got, if this was the pass that gives them."""
        results = self.trainer.log_probs(samples, reference=reference)
        records = self.trainer.routing == "old" and not reference
        return self._from_first((results, [sample.routed_experts for sample in samples] if records else None))

    def step(self, samples: list[TrainSample]) -> StepResult | None:
        return self._from_first(self.trainer.step(samples))

    def update_reference(self) -> None:
        self.trainer.update_reference()

    def save(self, folder: Path, with_optimizer: bool) -> None:
        self.trainer.save(folder, with_optimizer=with_optimizer)

    def load(self, folder: Path, with_optimizer: bool) -> None:
        self.trainer.load(folder, with_optimizer=with_optimizer)

    def export(self, folder: Path, source: Path) -> None:
        save_hf_model(self.trainer.model, folder, source=source, on_bytes=self._reporter("exporting"))

    def open_copies(self, address: tuple[str, int], num_receivers: int) -> None:
        """Meet the processes that keep copies of the weights: rank 0 sends, to all of them at once."""
        if self.place.rank == 0:
            self._copies = CopySender(copies_group(self.config, self.device, address, 0, 1 + num_receivers))

    def weights(self, what: str, *arguments: Any) -> None:
        """Bring the weights to SGLang's servers: `RankWeights` says how."""
        self._weights_for_servers.do(what, *arguments)

    def send_copies(self) -> None:
        """All ranks gather, one parameter at a time; rank 0 sends."""
        gathered = ((name, whole(p)) for name, p in self.trainer.model.named_parameters())
        if self._copies is not None:
            self._copies.send(gathered)
        for _ in gathered:
            pass

    def state_dict(self) -> dict[str, Any] | None:
        return self._from_first(self.trainer.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainer.load_state_dict(state)

    # Sampling

    def kv_tokens(self, longest: int) -> int:
        """Tokens for which this rank has room beside the gathered weights and what training allocates later."""
        model = self.trainer.model
        whole = sum(p.numel() for name, p in model.named_parameters() if ".experts." not in name)
        here = sum(shard.local.numel() for shard in self.trainer.optimizer.shards.values())
        element_size = self.dtype.itemsize
        room = cache_bytes(self.config, self.device, reserved=12 * here + element_size * whole)
        return kv_tokens(self.config, model.config, element_size=element_size, num_bytes=room, longest=longest)

    def open_engine(self, num_tokens: int, max_context_len: int) -> None:
        with self.trainer.rollout_weights() as model:
            peers = Peers(model) if model.config.num_sparse_layers else None
            engine = embedded_engine(self.config, model, num_tokens, max_context_len, peers)
        self._requests = RequestServer(engine, self.place, peers)

    def begin_sampling(self, version: int) -> None:
        """Make the weights ready to sample with."""
        self._weights.enter_context(self.trainer.rollout_weights())
        self._served.engine.set_version(version)

    def end_sampling(self) -> None:
        """Give back what sampling alone needs."""
        self._served.engine.release_memory()
        self._weights.close()

    def _load(self, folder: Path, on_bytes: OnBytes) -> LanguageModel:
        """The model of an HF folder, this rank's part of it."""
        with torch.device("meta"):
            model = build_model(read_model_config(read_hf_config(folder))).to(self.dtype)
        reduce_dtype = torch.bfloat16 if self.config.parallel.grad_reduce_in_bf16 else torch.float32
        shard_model(model, self.meshes, reduce_dtype=reduce_dtype)
        model.to_empty(device=self.device)
        if self.meshes.layout.pp_size == 1:
            model.tie_weights()
        weights_filler(self.config)(model, folder, on_bytes=on_bytes)
        return model

    def _on_micro_batch(self, num_samples: int) -> None:
        """Ranks that share samples count them once; the others just live."""
        meshes = self.meshes
        if meshes.is_last_stage and meshes.cp_rank == 0 and meshes.tp_rank == 0:
            self.place.report("samples", num_samples)
        else:
            self.place.is_alive()

    def _reporter(self, label: str) -> OnBytes:
        def report(done: int, total: int) -> None:
            self.place.report(label, (done, total))

        return report

    def _from_first(self, value: T) -> T | None:
        """What all ranks know alike, one of them says."""
        return value if self.place.rank == 0 else None


def take_device(place: Place, config: Config, device_type: str) -> torch.device:
    """This rank's GPU, or its share of the machine's cores."""
    per_machine = config.cluster.actor_num_gpus_per_node
    torch.set_num_threads(config.cluster.num_threads or max(1, torch.get_num_threads() // per_machine))
    if device_type == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)


def _join(place: Place, plan: RankPlan) -> None:
    """Meet the other ranks."""
    # Where two kinds of parallelism divide the same dim of a weight, gathering it takes two steps, and that is fine.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a rank on a Ray node has its node's
    host, port = plan.rendezvous
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
    timeout = timedelta(minutes=plan.config.cluster.distributed_timeout_minutes)
    dist.init_process_group(
        "gloo" if plan.device_type == "cpu" else "cpu:gloo,cuda:nccl",
        store=_dist.TCPStore(host, port, is_master=False, timeout=timeout),
        rank=place.rank,
        world_size=place.world_size,
        timeout=timeout,
    )
