"""What each process of `test_parallel_training` does. Imports no transformers: several processes start at once."""

from __future__ import annotations

import copy
import json
import os
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lockstep.algorithms import make_policy_loss
from lockstep.config import BatchingOptions, OptimizerOptions
from lockstep.models import LanguageModel, build_model, read_model_config
from lockstep.parallel.mesh import Layout, Meshes
from lockstep.parallel.shard import shard_model, sharded_parameters
from lockstep.trainer.batch import TrainSample
from lockstep.trainer.engine import LogProbs, StepResult
from lockstep.trainer.parallel import ParallelTrainer

OPTIONS: dict[str, Any] = {
    "temperature": 0.8,
    "needs_entropy": True,
    "num_steps": 10,
    # With the usual tiny epsilon, a gradient that is 0 but for rounding would become a whole step of either sign.
    "optimizer": OptimizerOptions(lr=0.005, lr_decay_style="constant", adam_eps=0.01, clip_grad=0.5),
}


@dataclass(frozen=True)
class Expected:
    """What one process finds at one step."""

    metrics: dict[str, float]
    policy: list[LogProbs]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model, two batches, and what one process makes of them."""

    hf_config: dict[str, Any]
    weights: dict[str, Tensor]
    estimator: str
    routing: str
    batching: dict[str, Any]
    batches: list[list[TrainSample]]
    expected: list[Expected]
    tolerance: float

    def trainer_options(self) -> dict[str, Any]:
        loss = make_policy_loss(
            self.estimator, use_kl_loss=True, kl_loss_coef=0.05, kl_loss_type="low_var_kl", entropy_coef=0.01
        )
        batching = BatchingOptions(use_dynamic_batch_size=True, **self.batching)
        return OPTIONS | {"loss": loss, "routing": self.routing, "batching": batching, "reference": None}

    def model(self) -> LanguageModel:
        model = build_model(read_model_config(self.hf_config))
        model.load_state_dict(self.weights)
        return model


def one_process(family: str) -> str:
    """Folder of the checkpoint that one process writes after its first step."""
    return f"{family} one process"


def run_rank(rank: int, world_size: int, layouts: list[dict[str, int]], root: Path) -> None:
    """Every layout of every case, in sequence; mismatches go to a file."""
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{root / 'store'}", rank=rank, world_size=world_size)
    report: dict[str, Any] = {"problems": [], "seconds": {}, "last": {}}
    try:
        meshes: dict[Layout, Meshes] = {}
        for path in sorted(root.glob("*.case")):
            case: Case = torch.load(path, weights_only=False)
            earlier = root / one_process(path.stem)
            for sizes in layouts:
                layout = Layout(world_size=world_size, **_for_layers(sizes, case))
                if not _fits(layout, case):
                    continue
                started = time.monotonic()
                meshes[layout] = meshes.get(layout) or Meshes(layout, device.type)
                name = f"{path.stem} {layout}"
                saved = root / name
                report["problems"] += [f"{name}: {p}" for p in run_layout(case, meshes[layout], device, saved, earlier)]
                report["seconds"][name] = round(time.monotonic() - started, 2)
                earlier = saved
                report["last"][path.stem] = name
    except Exception:
        report["problems"].append(traceback.format_exc())
    (root / f"rank_{rank}.json").write_text(json.dumps(report))
    if not report["problems"]:
        dist.barrier()
    os._exit(0)  # taking gloo down aborts now and then, in its own threads


def _for_layers(sizes: dict[str, int], case: Case) -> dict[str, Any]:
    """Uneven stages where the layers allow it: the last one, which has the head, gets other than its share."""
    layers, stages = case.hf_config["num_hidden_layers"], sizes.get("pp_size", 1)
    if stages == 1:
        return sizes
    possible = [last for last in range(1, layers - stages + 2) if (layers - last) % (stages - 1) == 0]
    uneven = [last for last in possible if last * stages != layers]
    return {**sizes, "decoder_last_pipeline_num_layers": (uneven or possible)[0]}


def _fits(layout: Layout, case: Case) -> bool:
    """A dense model is not asked for layouts of experts."""
    return layout.ep_size == 1 or read_model_config(case.hf_config).num_experts > 0


def run_layout(case: Case, meshes: Meshes, device: torch.device, saved: Path, earlier: Path) -> list[str]:
    """First step from the first weights; second step from the checkpoint that the layout before has written."""
    model = case.model().to(device)
    meshes.layout.check(model.config)
    shard_model(model, meshes, reduce_dtype=torch.float32)
    trainer = ParallelTrainer(model, meshes, device=device, **case.trainer_options())
    batches = copy.deepcopy(case.batches)
    problems = []
    if case.routing == "old":
        trainer.log_probs(batches[0])  # records the routes that the step replays
    result = trainer.step(batches[0])
    problems += [f"step 1: {p}" for p in differences(result, trainer, case.expected[0], case.tolerance)]
    if dist.get_rank() == 0:
        saved.mkdir()
    dist.barrier()
    trainer.save(saved)
    trainer.load(earlier)
    before = trainer.log_probs(batches[1])
    result = trainer.step(batches[1])
    problems += [f"step 2: {p}" for p in differences(result, trainer, case.expected[1], case.tolerance)]
    worst = max(float((a.log_probs - b.log_probs).abs().max()) for a, b in zip(before, result.policy, strict=True))
    if worst > 10 * case.tolerance:
        problems.append(f"log_probs differs from the training forward by {worst:.1e}")
    return problems


def differences(result: StepResult, trainer: ParallelTrainer, expected: Expected, tolerance: float) -> list[str]:
    found = []
    for name, wanted in expected.metrics.items():
        # Signed terms nearly cancel in the loss, and their mean size is about one.
        if abs(result.metrics[name] - wanted) > tolerance * max(1.0, abs(wanted)):
            found.append(f"{name} is {result.metrics[name]!r}, not {wanted!r}")
    for index, (mine, wanted) in enumerate(zip(result.policy, expected.policy, strict=True)):
        # fp32 log-probs of size 5 from sums over widths and vocabulary: 10 roundings.
        if float((mine.log_probs - wanted.log_probs).abs().max()) > 10 * tolerance:
            found.append(f"log-probs of sample {index} differ")
        if not torch.equal(_flips(mine), _flips(wanted)):
            found.append(f"flipped routes of sample {index} differ")
    for shard in sharded_parameters(trainer.model, trainer.meshes):
        wanted = expected.weights[shard.name]
        error = (
            float((shard.local.cpu() - _part_held(shard.stored, wanted)).abs().max()) if shard.local.numel() else 0.0
        )
        if not error <= tolerance * float(wanted.abs().max()):
            found.append(f"{shard.name} is off by {error:.1e}")
    return found


def _part_held(stored: DTensor, whole: Tensor) -> Tensor:
    """What a rank holds of a whole tensor, by the question that torch's checkpoints ask."""
    (chunk,) = stored.__create_chunk_list__()
    return whole[tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))]


def _flips(result: LogProbs) -> Tensor:
    """None says that no sample of the micro-batch had recorded routes, and micro-batches depend on the layout."""
    return torch.zeros_like(result.log_probs).bool() if result.routes_differ is None else result.routes_differ
