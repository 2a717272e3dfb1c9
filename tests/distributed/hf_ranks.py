"""What each process of `test_hf_shards` does. Imports no transformers: several processes start at once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lockstep.checkpoint.hf import fill_with_dummies, load_hf_weights, read_hf_config, save_hf_model
from lockstep.errors import CheckpointError
from lockstep.models import LanguageModel, build_model, read_model_config

FULL, DRAWN = "full.pt", "drawn.pt"


def run_rank(rank: int, world_size: int, layout: str, root: Path) -> None:
    """Load a folder sharded, report on it, export it again."""
    dist.init_process_group("gloo", init_method=f"file://{root / 'store'}", rank=rank, world_size=world_size)
    with torch.device("meta"):
        model = build_model(read_model_config(read_hf_config(root / "theirs"))).bfloat16()
    LAYOUTS[layout](model)
    model.to_empty(device="cpu")
    model.tie_weights()
    report = {"bytes_read": load_hf_weights(model, root / "theirs")}
    report["bytes_held"] = sum(parameter.to_local().nbytes for parameter in model.parameters())
    full = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
    if rank == 0:
        torch.save(full, root / FULL)
    save_hf_model(model, root / "ours", source=root / "theirs")
    try:
        save_hf_model(model, root / "theirs" / "config.json" / "below_a_file", source=root / "theirs")
    except CheckpointError as error:
        report["error"] = error.field
    fill_with_dummies(model, root)
    drawn = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
    if rank == 0:
        torch.save(drawn, root / DRAWN)
    (root / f"rank_{rank}.json").write_text(json.dumps(report))
    dist.barrier()
    os._exit(0)  # taking gloo down aborts now and then, in its own threads


def shard_with_fsdp(model: LanguageModel) -> None:
    """Every parameter by its first dim: experts by whole experts."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def shard_second_dims(model: LanguageModel) -> None:
    """Borders fall inside the stacked halves of experts, and inside blocks that share a scale."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            _replace(module, name, parameter, mesh, [Shard(min(1, parameter.dim() - 1))])


def shard_over_two_axes(model: LanguageModel) -> None:
    """Matrices by rows over one axis and by columns over the other; vectors over one, with copies over the other."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            placements = [Shard(0), Shard(1)] if parameter.dim() > 1 else [Replicate(), Shard(0)]
            _replace(module, name, parameter, mesh, placements)


def _replace(module: nn.Module, name: str, parameter: nn.Parameter, mesh: DeviceMesh, placements: list) -> None:
    if not isinstance(parameter, DTensor):
        module.register_parameter(name, nn.Parameter(distribute_tensor(parameter, mesh, placements)))


LAYOUTS = {"fsdp": shard_with_fsdp, "second dims": shard_second_dims, "two axes": shard_over_two_axes}
