"""What each process of `test_parallel_training` does. Imports no transformers: several processes start at once."""

from __future__ import annotations

import copy
import json
import math
import os
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lockstep.algorithms import make_policy_loss
from lockstep.config import BatchingOptions, OptimizerOptions
from lockstep.errors import CheckpointError, OptionError
from lockstep.kernels.adamw import join_master
from lockstep.models import LanguageModel, build_model, read_model_config
from lockstep.parallel.mesh import Layout, Meshes
from lockstep.parallel.shard import shard_model, sharded_parameters
from lockstep.plan.shares import largest_stage
from lockstep.trainer.batch import TrainSample
from lockstep.trainer.engine import LogProbs, StepResult, TrainingEngine
from lockstep.trainer.optimizer import Optimizer
from lockstep.trainer.optimizer.host_memory import host_memory_left
from lockstep.trainer.parallel import ParallelTrainer
from lockstep.trainer.shards import require_host_memory_of_all

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
    routing: tuple[Literal["own", "rollout", "old"], Literal["own", "rollout", "old"]]
    """Of the first step and of the second."""
    batching: dict[str, Any]
    batches: list[list[TrainSample]]
    expected: list[Expected]
    tolerance: float

    def trainer_options(self) -> dict[str, Any]:
        loss = make_policy_loss(
            self.estimator, use_kl_loss=True, kl_loss_coef=0.05, kl_loss_type="low_var_kl", entropy_coef=0.01
        )
        batching, routing = self.batching_options(), self.routing[0]
        return OPTIONS | {"loss": loss, "routing": routing, "batching": batching, "reference": None}

    def batching_options(self, **changes: Any) -> BatchingOptions:
        return BatchingOptions(**{"use_dynamic_batch_size": True} | self.batching | changes)

    def batches_for(self, trainer: TrainingEngine) -> list[list[TrainSample]]:
        """Fresh ones; where the experts of before all steps serve training, they are recorded here."""
        batches = copy.deepcopy(self.batches)
        for samples in batches:
            if "old" in self.routing:
                trainer.log_probs(samples)
        return batches

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
            for layout in dict.fromkeys(_layout_for(case, world_size, sizes) for sizes in layouts):
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


def _layout_for(case: Case, world_size: int, sizes: dict[str, int]) -> Layout:
    """Without experts where there are none; stages are uneven where the layers allow it."""
    config, sizes = read_model_config(case.hf_config), dict(sizes)
    if not config.num_experts:
        sizes |= {"ep_size": 1, "etp_size": 1}
    layers, stages = config.num_hidden_layers, sizes.get("pp_size", 1)
    if stages > 1:
        possible = [last for last in range(1, layers - stages + 2) if (layers - last) % (stages - 1) == 0]
        uneven = [last for last in possible if last * stages != layers]
        sizes["decoder_last_pipeline_num_layers"] = (uneven or possible)[0]
    return Layout(world_size=world_size, **sizes)


def run_layout(case: Case, meshes: Meshes, device: torch.device, saved: Path, earlier: Path) -> list[str]:
    """First step from the first weights; second step from the checkpoint that the layout before has written.

    The first goes from micro-batch to micro-batch, the second from layer to layer where there are no stages.
    """
    model = case.model().to(device)
    meshes.layout.check(model.config)
    shard_model(model, meshes, reduce_dtype=torch.float32)
    trainer = ParallelTrainer(model, meshes, device=device, **case.trainer_options())
    batches = case.batches_for(trainer)
    problems = unplanned(trainer)
    result = trainer.step(batches[0])
    problems += [f"step 1: {p}" for p in differences(result, trainer, case.expected[0], case.tolerance)]
    if dist.get_rank() == 0:
        saved.mkdir()
    dist.barrier()
    trainer.save(saved)
    if meshes.layout.pp_size == 1:
        options = case.trainer_options() | {"batching": case.batching_options(backward_order="layer")}
        trainer = ParallelTrainer(model, meshes, device=device, **options)
    trainer.routing = case.routing[1]
    trainer.load(earlier)
    before = trainer.log_probs(copy.deepcopy(batches[1]))
    result = trainer.step(batches[1])
    problems += [f"step 2: {p}" for p in differences(result, trainer, case.expected[1], case.tolerance)]
    worst = max(float((a.log_probs - b.log_probs).abs().max()) for a, b in zip(before, result.policy, strict=True))
    if "old" not in case.routing and worst > 10 * case.tolerance:
        problems.append(f"log_probs differs from the training forward by {worst:.1e}")
    return problems


def unplanned(trainer: ParallelTrainer) -> list[str]:
    """Parameters of which the first rank of the largest stage holds another part than `lockstep plan` thinks."""
    meshes = trainer.meshes
    planned = largest_stage(trainer.model.config, meshes.layout, torch.float32)
    is_first = (meshes.dp_rank, meshes.cp_rank, meshes.tp_rank) == (0, 0, 0)
    if not is_first or [int(name) for name in trainer.model.model.layers] != list(planned.layers):
        return []
    held = {shard.name: shard.local.shape for shard in sharded_parameters(trainer.model, meshes)}
    shapes = {name: tensor.shape for name, tensor in planned.parameters.items()}
    return [f"{name}: {held.get(name)} is planned as {shape}" for name, shape in shapes.items() if held[name] != shape]


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


def run_rank_in_small_formats(rank: int, world_size: int, root: Path) -> None:
    """bf16 weights in every layout, and 8-bit moments saved in one layout and loaded in another."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root / 'store'}", rank=rank, world_size=world_size)
    report: dict[str, Any] = {"errors": {}}
    layouts = [Layout(world_size=world_size, **sizes) for sizes in ({}, {"tp_size": 2}, {"cp_size": 2}, {"ep_size": 2})]
    meshes = {str(layout): Meshes(layout, "cpu") for layout in layouts}
    for path in sorted(root.glob("*.case")):
        case: Case = torch.load(path, weights_only=False)
        for name in meshes:
            if "ep" in name and path.stem == "dense":
                continue
            trainer = _small_trainer(case, meshes[name])
            results = [trainer.step(samples) for samples in case.batches_for(trainer)]
            report["errors"][f"{path.stem} {name}"] = [
                error_of(result, expected) for result, expected in zip(results, case.expected, strict=True)
            ]
    eight_bit = {"use_precision_aware_optimizer": True, "exp_avg_dtype": "8bit", "exp_avg_sq_dtype": "8bit"}
    case = torch.load(root / "dense.case", weights_only=False)
    trainer = _small_trainer(case, meshes["tp2"], **eight_bit)
    trainer.step(case.batches[0])
    folder = root / "8 bit"
    folder.mkdir(exist_ok=True)
    trainer.save(folder)
    again = _small_trainer(case, meshes["tp2"], **eight_bit)
    again.load(folder)
    before, after = (dict(t.optimizer.named_state()) for t in (trainer, again))
    report["is_equal"] = all(torch.equal(before[name], after[name]) for name in before)
    try:
        _small_trainer(case, meshes["dp2"], **eight_bit).load(folder)
    except CheckpointError as error:
        report["refusal"] = str(error)
    report |= reference_report(case, meshes["dp2"])
    report |= by_layer_report(case, meshes["dp2"], torch.load(root / "by_layer.pt"))
    moe = torch.load(root / "moe.case", weights_only=False)
    meshes["pp2"] = Meshes(Layout(world_size=world_size, pp_size=2, decoder_last_pipeline_num_layers=2), "cpu")
    broken = [(case, "dp2", "layer"), (case, "cp2", "layer"), (case, "pp2", "micro-batch"), (moe, "dp2 x ep2", "layer")]
    broken += [(case, "tp2", "micro-batch"), (moe, "dp2 x ep2", "micro-batch")]
    report["broken"] = {f"{layout} {order}": broken_step(one, meshes[layout], order) for one, layout, order in broken}
    report["host_memory"] = [refusal_of_host_memory(share) for share in (0.2, 0.6, 0.6 * rank)]
    (root / f"rank_{rank}.json").write_text(json.dumps(report))
    dist.barrier()
    os._exit(0)


def refusal_of_host_memory(share: float) -> str | None:
    """What is said when this rank needs a share of what is left, and the other one as well."""
    try:
        require_host_memory_of_all(int(share * host_memory_left()))
    except OptionError as error:
        return str(error)
    return None


def by_layer_report(case: Case, meshes: Meshes, expected: dict[str, Any]) -> dict[str, Any]:
    """One step in bf16, layer by layer: how far from one process's, and how often weights are gathered for it."""
    options = case.trainer_options() | {"batching": case.batching_options(backward_order="layer")}
    trainer = _small_trainer(case, meshes, options=options)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = trainer.step(case.batches[0])
    masters = masters_of({name: shard.local for name, shard in trainer.optimizer.shards.items()}, trainer.optimizer)
    errors = [
        float((masters[name] - _part_held(shard.stored, expected["masters"][name])).abs().max())
        for name, shard in trainer.optimizer.shards.items()
    ]
    return {
        "by_layer_norm": result.metrics["train/grad_norm"] / expected["norm"],
        "by_layer_error": max(errors),
        "gathers": sum(event.name.split(" ")[0] == "FSDP::all_gather" for event in profile.events() or []),
        "num_micro_batches": len(trainer._packs(case.batches[0], case.batching["max_tokens_per_gpu"])),
    }


def masters_of(weights: dict[str, Tensor], optimizer: Optimizer) -> dict[str, Tensor]:
    """The fp32 masters of bf16 weights."""
    state = dict(optimizer.named_state())
    return {name: join_master(weight, state[f"remainder.{name}"]) for name, weight in weights.items()}


def reference_report(case: Case, meshes: Meshes) -> dict[str, Any]:
    """How far the reference model's log-probs are from the policy's, before and after it becomes the policy."""
    trainer = _small_trainer(case, meshes)
    trainer.reference = case.model().bfloat16()
    shard_model(trainer.reference, meshes, reduce_dtype=None)
    samples = case.batches[0]
    first = trainer.step(samples).policy
    frozen = trainer.log_probs(samples, reference=True)
    trainer.update_reference()
    now, moved = trainer.log_probs(samples), trainer.log_probs(samples, reference=True)
    pairs = {
        "reference_is_frozen": (first, frozen),
        "reference_moved": (now, moved),
        "policy_is_unchanged": (first, now),
    }
    return {
        name: all(torch.equal(a.log_probs, b.log_probs) for a, b in zip(*results, strict=True))
        for name, results in pairs.items()
    }


def broken_step(case: Case, meshes: Meshes, order: str) -> list[str]:
    """What is wrong with a step that has a gradient which is not finite, of a sample that one of the ranks has."""
    options = case.trainer_options() | {"batching": case.batching_options(backward_order=order)}
    trainer = _small_trainer(case, meshes, options=options)
    trainer.step(case.batches[0])
    before = {name: tensor.clone() for name, tensor in _everything(trainer).items()}
    samples = copy.deepcopy(case.batches[1])
    samples[0].advantage = float("nan")
    metrics = trainer.step(samples).metrics
    found = [name for name, tensor in _everything(trainer).items() if not torch.equal(tensor, before[name])]
    if metrics["train/skipped_steps"] != 1.0 or math.isfinite(metrics["train/grad_norm"]):
        found.append("it was not reported")
    if (trainer.optimizer.num_updates, trainer.num_steps_done) != (1, 2):
        found.append("it was not counted")
    if trainer.step(case.batches[1]).metrics["train/skipped_steps"] != 0.0:
        found.append("it left something behind")
    return found


def _everything(trainer: ParallelTrainer) -> dict[str, Tensor]:
    """All numbers that this rank has."""
    weights = {name: shard.local for name, shard in trainer.optimizer.shards.items()}
    return weights | dict(trainer.optimizer.named_state())


def _small_trainer(
    case: Case, meshes: Meshes, *, options: dict[str, Any] | None = None, **optimizer: Any
) -> ParallelTrainer:
    model = case.model().bfloat16()
    shard_model(model, meshes, reduce_dtype=torch.float32)
    options = options or case.trainer_options()
    options["optimizer"] = OptimizerOptions(**options["optimizer"].model_dump() | optimizer)
    return ParallelTrainer(model, meshes, device=torch.device("cpu"), **options)


def error_of(result: StepResult, expected: Expected) -> float:
    """Root of the mean squared distance of all log-probs."""
    pairs = zip(result.policy, expected.policy, strict=True)
    return float(torch.cat([a.log_probs - b.log_probs for a, b in pairs]).square().mean().sqrt())
