"""From a whole model to this rank's shards of it, computed with as if it were whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lockstep.models import LanguageModel
from lockstep.models.layers.moe import Experts
from lockstep.parallel.experts import AllToAllExperts, divide_width
from lockstep.parallel.local import Views, compute_on_local_tensors
from lockstep.parallel.mesh import Meshes
from lockstep.parallel.pipeline import keep_stage
from lockstep.parallel.tensor import divide_tensors

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def shard_model(model: LanguageModel, meshes: Meshes, *, reduce_dtype: torch.dtype | None) -> None:
    """Divide a model over all ranks, in place: stages, then heads and experts, then FSDP.

    The model may hold weights, the same on every rank, or be on `meta` to be filled afterwards. Every parameter is a
    DTensor after this. The loss is a sum over tokens, so gradients are summed over ranks, never averaged.

    Args:
        reduce_dtype: in which gradients are reduced over data-parallel ranks; None is the weights' own.
    """
    views: Views = {}
    keep_stage(model, meshes)
    if meshes.layout.tp_size > 1:
        divide_tensors(model, meshes.dense["tp"], views)
    blocks = list(model.model.layers.values())
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    for module in experts:
        _divide_experts(module, meshes, views)
        _fully_shard(module, meshes.experts["fsdp"], reduce_dtype, keep_gathered=False)
        compute_on_local_tensors(module, views, without=set())
    for block in blocks:
        _fully_shard(block, meshes.dense["fsdp"], reduce_dtype, keep_gathered=False)
        compute_on_local_tensors(block, views, without=set(experts))
    # The head is used after the model's forward, and backward begins with it.
    _fully_shard(model, meshes.dense["fsdp"], reduce_dtype, keep_gathered=True)
    compute_on_local_tensors(model.model.embed_tokens, views, without=set())
    compute_on_local_tensors(model.model.norm, views, without=set())


def _divide_experts(experts: Experts, meshes: Meshes, views: Views) -> None:
    layout, group = meshes.layout, meshes.expert_group
    if layout.ep_size > 1:
        for name, parameter in list(experts.named_parameters()):
            stored = distribute_tensor(parameter.detach(), meshes.experts["ep"], [Shard(0)], src_data_rank=None)
            experts.register_parameter(name, nn.Parameter(stored))
    if layout.etp_size > 1:
        divide_width(experts, dist.get_rank(group) % layout.etp_size, layout.etp_size, views)
    if layout.ep_size * layout.etp_size > 1:
        assert group is not None
        experts.compute = AllToAllExperts(group, layout.etp_size)


def _fully_shard(unit: nn.Module, mesh: DeviceMesh, reduce_dtype: torch.dtype | None, *, keep_gathered: bool) -> None:
    policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=not keep_gathered)
    assert isinstance(unit, FSDPModule)
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)


@dataclass(frozen=True)
class ShardedParameter:
    """One parameter of the whole model, as this rank stores it."""

    name: str
    """In the whole model."""
    stored: DTensor
    sum_over: tuple[dist.ProcessGroup, ...]
    """Groups whose ranks each have a share of the gradient of the same numbers."""
    is_counted_here: bool
    """Whether this rank answers for its numbers in a sum over all ranks."""

    @property
    def local(self) -> Tensor:
        """This rank's numbers, in the memory in which FSDP keeps them."""
        local: Tensor = self.stored.to_local()
        return local.detach()


def sharded_parameters(model: LanguageModel, meshes: Meshes) -> Iterator[ShardedParameter]:
    """All parameters of this rank's stage, ranks without a single number of them included."""
    is_tied = model.config.tie_word_embeddings
    for name, stored in model.named_parameters():
        assert isinstance(stored, DTensor), f"{name} was not sharded"
        groups, is_counted = [], True
        for axis, placement in zip(stored.device_mesh.mesh_dim_names or (), stored.placements, strict=True):
            if isinstance(placement, Replicate):
                groups.append(stored.device_mesh.get_group(axis))
                is_counted &= stored.device_mesh.get_local_rank(axis) == 0
        if is_tied and name in (_EMBEDDING, _HEAD) and meshes.tied_group is not None:
            name = _EMBEDDING
            groups.append(meshes.tied_group)
            is_counted &= meshes.is_first_stage
        yield ShardedParameter(name, stored, tuple(groups), is_counted)
