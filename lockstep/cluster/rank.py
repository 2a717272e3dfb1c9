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

from lockstep.checkpoint.hf import OnBytes, load_hf_weights, read_hf_config, save_hf_model
from lockstep.cluster.parts import cache_bytes, embedded_engine, kv_tokens, layout_of, reference_folder, trainer_options
from lockstep.cluster.worker import Place
from lockstep.config import Config
from lockstep.models import LanguageModel, build_model, read_model_config
from lockstep.parallel.decode import Peers
from lockstep.parallel.mesh import Meshes
from lockstep.parallel.shard import shard_model
from lockstep.rollout.embedded import EmbeddedEngine
from lockstep.rollout.embedded.sequence import Sequence
from lockstep.rollout.engine import Generation, SamplingParams
from lockstep.trainer.batch import TrainSample
from lockstep.trainer.engine import LogProbs, StepResult
from lockstep.trainer.parallel import ParallelTrainer

T = TypeVar("T")
_STEP, _STOP = 1, 2
"""What a rank wants next; 0 is nothing. The largest wish counts."""


@dataclass(frozen=True)
class RankPlan:
    """Everything a rank needs to know."""

    config: Config
    device_type: str
    num_steps: int
    rendezvous: Path
    """A path where no file is yet; ranks meet there."""


@dataclass(frozen=True)
class Request:
    """A response that the controller waits for."""

    number: int
    input_ids: list[int]
    params: SamplingParams
    stream: tuple[int, ...]


class Rank:
    """A `ParallelTrainer`, and an `EmbeddedEngine` once it is opened."""

    def __init__(self, place: Place, plan: RankPlan) -> None:
        self.place = place
        self.config = plan.config
        self.device = _take_device(place.rank, plan)
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
        self._engine: EmbeddedEngine | None = None
        self._peers: Peers | None = None
        self._weights = contextlib.ExitStack()
        self._sequences: dict[int, Sequence] = {}

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
            self._peers = Peers(model, self.device) if model.config.num_sparse_layers else None
            self._engine = embedded_engine(self.config, model, num_tokens, max_context_len, self._peers)

    def begin_sampling(self, version: int) -> None:
        """Make the weights ready to sample with."""
        self._weights.enter_context(self.trainer.rollout_weights())
        self.engine.set_version(version)

    def end_sampling(self) -> None:
        """Give back what sampling alone needs."""
        self._weights.close()

    def advance(self, requests: list[Request], aborted: list[int]) -> list[tuple[int, Generation | Exception]]:
        """Take requests in and let others go; then sample until some are finished, nothing is left, or a poke.

        Ranks that decode together all do so until that happens to one of them.

        Returns:
            What has become of requests, by their number.
        """
        ended: list[tuple[int, Generation | Exception]] = []
        for request in requests:
            sequence = self.engine.sequence(request.input_ids, request.params, request.stream)
            try:
                self.engine.add(sequence)
            except Exception as error:
                ended.append((request.number, error))
            else:
                self._sequences[request.number] = sequence
        for number in aborted:
            if (found := self._sequences.get(number)) is not None:
                found.finish_reason = "abort"
        finished = self.engine.finish_aborted()
        while self._goes_on(has_news=bool(finished or ended)):
            finished = self.engine.step()
            self.place.is_alive()
        self.place.is_poked.clear()  # one that comes later makes the next call come back at once, which does no harm
        number_of = {sequence: number for number, sequence in self._sequences.items()}
        for sequence in finished:
            number = number_of[sequence]
            del self._sequences[number]
            assert sequence.generation is not None, "a finished sequence has its result"
            ended.append((number, sequence.generation))
        return ended

    @property
    def engine(self) -> EmbeddedEngine:
        assert self._engine is not None, "open_engine comes first"
        return self._engine

    def _goes_on(self, *, has_news: bool) -> bool:
        """Whether to sample another step, which ranks that decode together answer alike."""
        wish = _STOP if has_news or self.place.is_poked.is_set() else int(self.engine.has_work)
        return (wish if self._peers is None else self._peers.most(wish)) == _STEP

    def _load(self, folder: Path, on_bytes: OnBytes) -> LanguageModel:
        """The model of an HF folder, this rank's part of it."""
        with torch.device("meta"):
            model = build_model(read_model_config(read_hf_config(folder))).to(self.dtype)
        reduce_dtype = torch.bfloat16 if self.config.parallel.grad_reduce_in_bf16 else torch.float32
        shard_model(model, self.meshes, reduce_dtype=reduce_dtype)
        model.to_empty(device=self.device)
        if self.meshes.layout.pp_size == 1:
            model.tie_weights()
        load_hf_weights(model, folder, on_bytes=on_bytes)
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


def _take_device(rank: int, plan: RankPlan) -> torch.device:
    """This rank's GPU, or its share of the cores."""
    threads = plan.config.cluster.num_threads or max(1, torch.get_num_threads() // layout_of(plan.config).world_size)
    torch.set_num_threads(threads)
    if plan.device_type == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def _join(place: Place, plan: RankPlan) -> None:
    """Meet the other ranks, all on this machine."""
    # Where two kinds of parallelism divide the same dim of a weight, gathering it takes two steps, and that is fine.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo" if plan.device_type == "cpu" else "cpu:gloo,cuda:nccl",
        init_method=f"file://{plan.rendezvous}",
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(minutes=plan.config.cluster.distributed_timeout_minutes),
    )
