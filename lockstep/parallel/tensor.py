"""Tensor parallelism with sequence parallelism (arXiv:2205.05198): heads and widths of a layer divided over ranks.

Between layers' matrices every rank has its own rows. A layer gathers all rows when it is entered, computes its slice
of heads or columns, and its last matrix returns partial sums that are reduced and scattered to rows again. What works
row by row (norms, routers, residuals) is whole on every rank; its gradient is summed over ranks once per step.

Parameters are stored as DTensors and computed with as plain tensors, see `local.py`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from lockstep.kernels.lookup import look_up
from lockstep.models import LanguageModel
from lockstep.models.layers.attention import Attention
from lockstep.models.layers.embedding import Embedding
from lockstep.models.layers.gated_delta_net import GatedDeltaNet
from lockstep.models.layers.mlp import GatedMLP
from lockstep.models.layers.moe import Experts
from lockstep.parallel.collectives import all_gather_rows, reduce_scatter_rows
from lockstep.parallel.local import Views

_COLUMNS, _ROWS, _WHOLE = Shard(0), Shard(1), Replicate()


class VocabParallelEmbedding(nn.Module):
    """Each rank looks up the tokens of its slice of the vocabulary; the rows come out scattered over ranks."""

    def __init__(self, weight: nn.Parameter, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight = weight
        self.group = group

    def forward(self, input_ids_T: Tensor) -> Tensor:
        size = len(self.weight)
        places_T = input_ids_T - size * self.group.rank()
        is_mine_T = (places_T >= 0) & (places_T < size)
        rows_TD = look_up(self.weight, places_T.where(is_mine_T, 0)) * is_mine_T.unsqueeze(1)
        return reduce_scatter_rows(rows_TD, self.group)


def divide_tensors(model: LanguageModel, mesh: DeviceMesh, views: Views) -> None:
    """Shard all but the experts over the one-dimensional mesh, in place.

    Args:
        views: gets what a rank computes with, where that is not what it stores.
    """
    _Division(mesh, views).of_model(model)


class _Division:
    def __init__(self, mesh: DeviceMesh, views: Views) -> None:
        self.mesh, self.views = mesh, views
        self.group, self.rank, self.size = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self._placed: dict[nn.Parameter, nn.Parameter] = {}
        """From a whole parameter to its DTensor; tied ones stay one."""

    def of_model(self, model: LanguageModel) -> None:
        for module in list(model.modules()):
            if isinstance(module, Attention):
                self._attention(module)
            elif isinstance(module, GatedDeltaNet):
                self._delta_net(module)
            elif isinstance(module, GatedMLP):
                self._surround(module, module.gate_proj, module.up_proj, module.down_proj)
        if isinstance(model.model.embed_tokens, Embedding):
            embedding: Any = VocabParallelEmbedding(cast(nn.Parameter, model.model.embed_tokens.weight), self.group)
            model.model.embed_tokens = embedding
            self._place(embedding, _COLUMNS)
        self._place(model.lm_head, _COLUMNS)
        for module in model.modules():
            if not isinstance(module, Experts):
                self._place(module, _WHOLE)

    def _attention(self, layer: Attention) -> None:
        num_keys = layer.k_proj.out_features // layer.head_dim
        for projection in (layer.k_proj, layer.v_proj):
            if num_keys % self.size == 0:
                self._place(projection, _COLUMNS)
            else:
                # Fewer heads than ranks: several ranks compute with the same one.
                head = self.rank * num_keys // self.size
                self._view_rows(projection, layer.head_dim, head, head + 1)
        self._surround(layer, layer.q_proj, layer.o_proj)

    def _delta_net(self, layer: GatedDeltaNet) -> None:
        """The convolution's rows are queries, keys and values one after the other, so no single slice fits a rank."""
        num_values = len(layer.A_log)
        num_keys, here = num_values // layer.values_per_key, self.rank
        key_width, value_width = num_keys * layer.key_head_dim, num_values * layer.value_head_dim

        def conv_rows(weight: Tensor) -> Tensor:
            parts = weight.split([key_width, key_width, value_width])
            return torch.cat([part.chunk(self.size)[here] for part in parts])

        self.views[layer.conv1d, "weight"] = conv_rows
        for name in ("A_log", "dt_bias"):
            self.views[layer, name] = lambda whole: whole.chunk(self.size)[here]
        self._surround(layer, layer.in_proj_qkvz, layer.in_proj_ba, layer.out_proj)

    def _surround(self, layer: nn.Module, *projections: nn.Linear) -> None:
        """Gather rows on entry, scatter them after the last projection, whose columns are divided like their rows."""
        *inner, last = projections
        for projection in inner:
            self._place(projection, _COLUMNS)
        layer.register_forward_pre_hook(lambda _, args: (all_gather_rows(args[0], self.group), *args[1:]))
        last.register_forward_hook(lambda _, args, partial: reduce_scatter_rows(partial, self.group))
        self._place_one(last, "weight", _ROWS)
        # Every rank adds a bias to its partial sums, so only the first adds the real one.
        self.views[last, "bias"] = lambda bias: bias * (self.rank == 0)

    def _view_rows(self, projection: nn.Linear, height: int, start: int, stop: int) -> None:
        for name in ("weight", "bias"):
            self.views[projection, name] = lambda whole: whole[start * height : stop * height]

    def _place(self, module: nn.Module, placement: Placement) -> None:
        for name in list(module._parameters):
            self._place_one(module, name, placement)

    def _place_one(self, module: nn.Module, name: str, placement: Placement) -> None:
        parameter = module._parameters[name]
        if parameter is None or isinstance(parameter, DTensor):
            return
        if parameter not in self._placed:
            stored = distribute_tensor(parameter.detach(), self.mesh, [placement], src_data_rank=None)
            self._placed[parameter] = nn.Parameter(stored)
        module.register_parameter(name, self._placed[parameter])
