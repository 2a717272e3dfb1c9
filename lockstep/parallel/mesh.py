"""How ranks share the work: sizes of every kind of parallelism, and the process groups that they imply.

Ranks are numbered as in Megatron. Dense layers see them as `[pipeline, data, context, tensor]`, experts as
`[pipeline, expert data, expert, expert tensor]`, the last one fastest; both views cover the same ranks of a stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lockstep.errors import OptionError
from lockstep.models import ModelConfig, Qwen3NextConfig

_FLAGS = {
    "tp_size": "--tensor-model-parallel-size",
    "cp_size": "--context-parallel-size",
    "pp_size": "--pipeline-model-parallel-size",
    "ep_size": "--expert-model-parallel-size",
    "etp_size": "--expert-tensor-parallel-size",
}

_EXPERT_WIDTH_MULTIPLE = 8
"""Grouped matrix products want rows of a multiple of 16 bytes."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes by Megatron's meaning; data parallelism is what is left."""

    world_size: int
    tp_size: int = 1
    cp_size: int = 1
    pp_size: int = 1
    ep_size: int = 1
    etp_size: int = 1
    decoder_first_pipeline_num_layers: int | None = None
    decoder_last_pipeline_num_layers: int | None = None

    @property
    def dp_size(self) -> int:
        return self.world_size // (self.tp_size * self.cp_size * self.pp_size)

    @property
    def expert_dp_size(self) -> int:
        return self.world_size // (self.pp_size * self.ep_size * self.etp_size)

    @property
    def row_multiple(self) -> int:
        """A pack is padded to a multiple of this, so that every rank holds the same number of rows."""
        return self.tp_size * (2 * self.cp_size if self.cp_size > 1 else 1)

    def __str__(self) -> str:
        sizes = {"dp": self.dp_size} | {name.removesuffix("_size"): getattr(self, name) for name in _FLAGS}
        return " x ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "one rank"

    def stage_layers(self, num_layers: int) -> list[range]:
        """The layers of every pipeline stage: the first and the last as told, the others evenly."""
        sizes = self._stage_sizes(num_layers)
        assert sizes is not None, "check the layout against the model first"
        ends = [sum(sizes[: stage + 1]) for stage in range(self.pp_size)]
        return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]

    def check(self, config: ModelConfig) -> None:
        """Refuse what this number of ranks or this model cannot be divided into.

        Raises:
            OptionError: naming the first option that does not fit, and the nearest layout that does.
        """
        problem = self._problem(config)
        if problem is None:
            return
        field, value, reason = problem
        # Data parallelism alone is always possible.
        nearest = min((layout for layout in self._others() if layout._problem(config) is None), key=self._distance)
        flags = " ".join(f"{flag} {getattr(nearest, name)}" for name, flag in _FLAGS.items())
        given = " without --decoder-first/last-pipeline-num-layers" if self._has_stage_sizes else ""
        needed = self.tp_size * self.cp_size * self.pp_size
        enough = f"Give {needed} ranks: --actor-num-gpus-per-node {needed}. " if needed > self.world_size else ""
        ranks = f" of {self.world_size} ranks" if enough else ""
        raise OptionError(field, value, reason, f"{enough}The nearest possible layout{ranks} is {flags}{given}.")

    @property
    def _has_stage_sizes(self) -> bool:
        return not (self.decoder_first_pipeline_num_layers is None and self.decoder_last_pipeline_num_layers is None)

    def _stage_sizes(self, num_layers: int) -> list[int] | None:
        first, last = self.decoder_first_pipeline_num_layers, self.decoder_last_pipeline_num_layers
        rest = num_layers - (first or 0) - (last or 0)
        stages = self.pp_size - (first is not None) - (last is not None)
        if stages < 0 or rest < stages or (rest % stages if stages else rest):
            return None
        middle = [rest // stages] * stages if stages else []
        sizes = [*([] if first is None else [first]), *middle, *([] if last is None else [last])]
        return sizes if min(sizes) > 0 else None

    def _problem(self, config: ModelConfig) -> tuple[str, int | None, str] | None:
        tp, cp, pp, ep, etp = (getattr(self, name) for name in _FLAGS)
        flag = dict(zip(("tp", "cp", "pp", "ep", "etp"), _FLAGS.values(), strict=True))
        if self.world_size % (tp * cp * pp):
            ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
            reason = f"tensor {tp} x context {cp} x pipeline {pp} does not divide the {ranks} that there are."
            return flag["tp"], tp, reason
        if self.world_size // pp % (ep * etp):
            num_ranks = self.world_size // pp
            return (
                flag["ep"],
                ep,
                f"expert {ep} x expert tensor {etp} does not divide the {num_ranks} ranks of a stage.",
            )
        if etp > 1 and config.moe_intermediate_size % (etp * _EXPERT_WIDTH_MULTIPLE):
            width = config.moe_intermediate_size
            return flag["etp"], etp, f"a share of an expert's width {width} is no multiple of {_EXPERT_WIDTH_MULTIPLE}."
        if ep > 1 and config.num_experts % ep:
            return flag["ep"], ep, f"it does not divide the model's {config.num_experts} experts."
        if self._stage_sizes(config.num_hidden_layers) is None:
            return flag["pp"], pp, f"{config.num_hidden_layers} layers do not fill its stages as the options say."
        heads, keys = config.num_attention_heads, config.num_key_value_heads
        if heads % tp or (keys % tp and tp % keys):
            return flag["tp"], tp, f"it does not fit {heads} attention heads over {keys} key/value heads."
        widths = [config.vocab_size, *_widths(config)]
        if uneven := next((width for width in widths if width % tp), None):
            return flag["tp"], tp, f"it does not divide {uneven}, a vocabulary or layer width of the model."
        if isinstance(config, Qwen3NextConfig) and config.num_delta_layers:
            if config.linear_num_key_heads % tp:
                return flag["tp"], tp, f"it does not divide the delta rule's {config.linear_num_key_heads} key heads."
            if config.linear_num_key_heads % (tp * cp):
                reason = f"tensor {tp} x context {cp} does not divide the {config.linear_num_key_heads} key heads"
                return flag["cp"], cp, f"{reason} of the delta rule."
        return None

    def _others(self) -> Iterator[Layout]:
        sizes = [size for size in range(1, self.world_size + 1) if self.world_size % size == 0]
        for values in product(sizes, repeat=len(_FLAGS)):
            if math.prod(values[:3]) <= self.world_size and math.prod(values[3:]) <= self.world_size:
                yield Layout(world_size=self.world_size, **dict(zip(_FLAGS, values, strict=True)))

    def _distance(self, other: Layout) -> tuple[int, float]:
        """Options that differ, then by how much."""
        ratios = [math.log2(getattr(self, name) / getattr(other, name)) for name in _FLAGS]
        return sum(ratio != 0 for ratio in ratios), sum(abs(ratio) for ratio in ratios)


def _widths(config: ModelConfig) -> Iterator[int]:
    """Widths of feed-forward layers that tensor parallelism divides."""
    if config.num_sparse_layers < config.num_hidden_layers:
        yield config.intermediate_size
    if isinstance(config, Qwen3NextConfig):
        yield config.shared_expert_intermediate_size


class Meshes:
    """This process's place in a layout, and the groups it talks to."""

    def __init__(self, layout: Layout, device_type: str) -> None:
        self.layout = layout
        pp, dp, cp, tp = layout.pp_size, layout.dp_size, layout.cp_size, layout.tp_size
        self.dense = init_device_mesh(device_type, (pp, dp * cp, tp), mesh_dim_names=("pp", "fsdp", "tp"))
        """Of dense parameters: whole between stages, FSDP shards over data x context, tensor shards inside."""
        by_expert = torch.arange(layout.world_size).view(pp, layout.expert_dp_size, layout.ep_size, layout.etp_size)
        stored = by_expert.transpose(2, 3).flatten(1, 2)
        self.experts = DeviceMesh(device_type, stored, mesh_dim_names=("pp", "fsdp", "ep"))
        """Of experts, which FSDP shards over expert data x expert tensor: see `experts.py`."""
        self.expert_group = _my_group(by_expert.flatten(2).flatten(0, 1).tolist())
        """The ranks that have all experts between them, those that share one next to each other."""
        self.data = init_device_mesh(device_type, (pp, dp, cp, tp), mesh_dim_names=("pp", "dp", "cp", "tp"))
        self.pp_rank, self.dp_rank, self.cp_rank, self.tp_rank = self.data.get_coordinate() or (0, 0, 0, 0)
        grid = self.data.mesh
        self.replica_group = _my_group([grid[:, place].flatten().tolist() for place in range(dp)])
        """All ranks that see the same samples."""
        self.tied_group = _my_group(grid[[0, -1]].flatten(1).T.tolist()) if pp > 1 else None
        """The first and the last stage, which both hold a tied embedding; None on stages between."""

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.layout.pp_size - 1

    def group(self, name: str) -> dist.ProcessGroup:
        """The group of this rank along `pp`, `dp`, `cp` or `tp`."""
        return self.data[name].get_group()

    def stage_neighbour(self, step: int) -> int:
        """Global rank of the same place in the next (1) or the previous (-1) stage."""
        return int(self.data.mesh[self.pp_rank + step, self.dp_rank, self.cp_rank, self.tp_rank])


def _my_group(groups: list[list[int]]) -> dist.ProcessGroup | None:
    """Make all of these groups, as every process has to, and return the one that this process is in."""
    mine: dist.ProcessGroup | None
    mine, _ = dist.new_subgroups_by_enumeration(groups)
    return mine
