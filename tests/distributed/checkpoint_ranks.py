"""What each process of `test_checkpoints_across_layouts` does. Imports no transformers: they start together.

Every state is random in every bit, so that a number in a wrong place shows.
"""

from __future__ import annotations

import json
import os
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lockstep.algorithms import SftLoss
from lockstep.checkpoint.tensors import tensor_names
from lockstep.config import BatchingOptions, OptimizerOptions
from lockstep.errors import CheckpointError
from lockstep.kernels.adamw import BLOCK
from lockstep.models import LanguageModel, build_model, read_model_config
from lockstep.parallel.mesh import Layout, Meshes
from lockstep.parallel.shard import ShardedParameter, shard_model, sharded_parameters
from lockstep.trainer.blocks import CUT
from lockstep.trainer.local import LocalTrainer
from lockstep.trainer.parallel import ParallelTrainer

COUNTS = {"version": 7, "num_steps_done": 9, "num_updates": 8, "reference_moved": True}


@dataclass(frozen=True)
class Case:
    """A model, a format of its state, and all of the state by the names of one process's checkpoint."""

    hf_config: dict[str, Any]
    dtype: torch.dtype
    moments: tuple[str, str]
    tensors: dict[str, Tensor]

    def model(self) -> LanguageModel:
        return build_model(read_model_config(self.hf_config)).to(self.dtype)

    def options(self) -> dict[str, Any]:
        first, second = self.moments
        formats = {"use_precision_aware_optimizer": True, "exp_avg_dtype": first, "exp_avg_sq_dtype": second}
        return {
            "loss": SftLoss(),
            "optimizer": OptimizerOptions(**formats),
            "batching": BatchingOptions(),
            "temperature": 1.0,
            "needs_entropy": False,
            "routing": "own",
            "num_steps": 10,
        }

    def local_trainer(self) -> LocalTrainer:
        trainer = LocalTrainer(self.model(), reference=self.model(), **self.options())
        trainer.load_state_dict(COUNTS)
        return trainer

    def parallel_trainer(self, meshes: Meshes) -> ParallelTrainer:
        model, reference = self.model(), self.model()
        for one in (model, reference):
            shard_model(one, meshes, reduce_dtype=torch.float32)
        device = torch.device("cpu")
        trainer = ParallelTrainer(model, meshes, reference=reference, device=device, **self.options())
        trainer.load_state_dict(COUNTS)
        return trainer


def run_rank(rank: int, world_size: int, layouts: list[dict[str, int]], root: Path) -> None:
    """Each layout reads what the one before it has written, looks at its part of it, and writes it again."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root / 'store'}", rank=rank, world_size=world_size)
    report: dict[str, Any] = {"problems": [], "last": {}}
    meshes: dict[Layout, Meshes] = {}
    try:
        for path in sorted(root.glob("*.case")):
            case: Case = torch.load(path, weights_only=False)
            earlier = root / path.stem
            for sizes in layouts:
                layout = Layout(world_size=world_size, **sizes)
                meshes[layout] = meshes.get(layout) or Meshes(layout, "cpu")
                trainer = case.parallel_trainer(meshes[layout])
                trainer.load(earlier)
                earlier = root / f"{path.stem} {layout}"
                report["problems"] += [f"{earlier.name}: {problem}" for problem in differences(trainer, case.tensors)]
                if rank == 0:
                    earlier.mkdir()
                dist.barrier()
                trainer.save(earlier)
            report["last"][path.stem] = earlier.name
        report["refusals"] = refusals(root, world_size)
    except Exception:
        report["problems"].append(traceback.format_exc())
    (root / f"rank_{rank}.json").write_text(json.dumps(report))
    if not report["problems"]:
        dist.barrier()
    os._exit(0)  # taking gloo down aborts now and then, in its own threads


def refusals(root: Path, world_size: int) -> list[str]:
    """Blocks that all ranks cut by tensor parallelism: what data parallelism says of them."""
    path = root / "8bit" / "odd.case"
    case: Case = torch.load(path, weights_only=False)
    cut = root / "8bit" / "cut"
    if dist.get_rank() == 0:
        cut.mkdir()
    dist.barrier()
    case.parallel_trainer(Meshes(Layout(world_size=world_size, tp_size=world_size), "cpu")).save(cut)
    whole = case.parallel_trainer(Meshes(Layout(world_size=world_size), "cpu"))
    assert not any(CUT in name for name, _ in whole.optimizer.sharded_state()), "data parallelism cuts no block"
    assert any(CUT in name for name in tensor_names(cut))
    try:
        whole.load(cut)
    except CheckpointError as error:
        return [str(error)]
    return []


def differences(trainer: ParallelTrainer, wholes: dict[str, Tensor]) -> list[str]:
    """What this rank holds, against its part of the whole state."""
    found = []
    assert trainer.reference is not None
    for kind, model in (("model", trainer.model), ("reference", trainer.reference)):
        for shard in sharded_parameters(model, trainer.meshes):
            if shard.local.numel() and not torch.equal(shard.local, _part(shard, wholes[f"{kind}.{shard.name}"])):
                found.append(f"{kind}.{shard.name}")
    for name, tensor in trainer.optimizer.named_state():
        shard = next((s for s in trainer.optimizer.shards.values() if name.endswith(f".{s.name}")), None)
        whole = wholes[f"optimizer.{name}"]
        expected = whole if shard is None else _part(shard, whole)
        if not torch.equal(tensor, expected):
            found.append(name)
    return found


def _part(shard: ShardedParameter, whole: Tensor) -> Tensor:
    """Of a state tensor, where this rank has its part of the weight; scales have one column for 128 of the weight."""
    assert isinstance(shard.stored, DTensor)
    (chunk,) = shard.stored.__create_chunk_list__()
    places = [slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True)]
    if whole.shape != shard.stored.shape:
        places[-1] = slice(places[-1].start // BLOCK, -(-places[-1].stop // BLOCK))
    return whole[tuple(places)]
