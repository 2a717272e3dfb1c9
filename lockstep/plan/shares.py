"""What one rank holds of every parameter, as tensors without memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from lockstep.models import ModelConfig, build_model
from lockstep.models.layers.gated_delta_net import GatedDeltaNet
from lockstep.models.layers.moe import Experts, Router
from lockstep.parallel.mesh import Layout

Parameters = dict[str, Tensor]
"""Tensors on the meta device by name."""


Division = Literal["experts", "rows", "columns", "whole"]


@dataclass(frozen=True)
class Counts:
    """How many numbers the parts of a stage have."""

    embedding: int
    head: int
    """With the final norm."""
    layers: dict[int, int]

    @classmethod
    def of(cls, parameters: Parameters) -> Counts:
        embedding, head, layers = 0, 0, dict[int, int]()
        for name, tensor in parameters.items():
            if name.startswith("model.layers."):
                layer = int(name.split(".")[2])
                layers[layer] = layers.get(layer, 0) + tensor.numel()
            elif name.startswith("model.embed_tokens."):
                embedding += tensor.numel()
            else:
                head += tensor.numel()
        return cls(embedding, head, layers)

    @property
    def outside_layers(self) -> int:
        return self.embedding + self.head

    @property
    def total(self) -> int:
        return self.outside_layers + sum(self.layers.values())


@dataclass(frozen=True)
class Stage:
    """A pipeline stage: what one of its ranks stores, and what it computes with when FSDP has gathered it."""

    layers: range
    parameters: Parameters
    stored: Counts
    gathered: Counts

    @property
    def largest_tensor(self) -> int:
        """In numbers."""
        return max(tensor.numel() for tensor in self.parameters.values())


@cache
def largest_stage(config: ModelConfig, layout: Layout, dtype: torch.dtype) -> Stage:
    """The stage whose ranks store most; all of the model where there is one rank."""
    with torch.device("meta"):
        model = build_model(config)
    model.to(dtype)
    whole = config.num_key_value_heads % layout.tp_size != 0
    divided = {name: _divided(module, name, has_whole_keys=whole) for module, name in _owners(model)}
    stages = []
    for number, layers in enumerate(layout.stage_layers(config.num_hidden_layers)):
        stored, gathered = {}, {}
        for name, parameter in model.named_parameters():
            if name.startswith("model.layers."):
                is_here = int(name.split(".")[2]) in layers
            else:
                is_here = number in _stages_outside_layers(name, config, layout)
            if is_here:
                gathered[name], stored[name] = _shares(parameter, divided[name], layout)
        stages.append(Stage(layers, stored, Counts.of(stored), Counts.of(gathered)))
    return max(stages, key=lambda stage: stage.stored.total)


@cache
def num_dense(config: ModelConfig) -> int:
    """Numbers of the whole model outside experts."""
    with torch.device("meta"):
        model = build_model(config)
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." not in name)


def _owners(model: nn.Module) -> Iterable[tuple[nn.Module, str]]:
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            yield module, f"{prefix}.{name}"


def _divided(module: nn.Module, name: str, *, has_whole_keys: bool) -> Division:
    """How the parameter is divided beside FSDP: see `divide_tensors` and `divide_width`."""
    if isinstance(module, Experts):
        return "experts"
    owner = name.rpartition(".")[0].rpartition(".")[2]
    if isinstance(module, Router | GatedDeltaNet) or owner.endswith(("norm", "shared_expert_gate", "conv1d")):
        return "whole"
    if owner in ("o_proj", "out_proj", "down_proj"):
        return "columns" if name.endswith("weight") else "whole"
    return "whole" if has_whole_keys and owner in ("k_proj", "v_proj") else "rows"


def _shares(parameter: Tensor, division: Division, layout: Layout) -> tuple[Tensor, Tensor]:
    """What the first rank computes with, and what it stores of that."""
    if division == "experts":
        gathered = _first(parameter, 0, layout.ep_size)
        return gathered, _first(gathered, 0, layout.expert_dp_size * layout.etp_size)
    dims = {"rows": 0, "columns": 1}
    gathered = _first(parameter, dims[division], layout.tp_size) if division in dims else parameter
    return gathered, _first(gathered, 0, layout.dp_size * layout.cp_size)


def _stages_outside_layers(name: str, config: ModelConfig, layout: Layout) -> set[int]:
    """Where an embedding, the final norm or the head is; tied embeddings are on the first and on the last stage."""
    first, last = 0, layout.pp_size - 1
    if name.startswith("model.embed_tokens."):
        return {first, last} if config.tie_word_embeddings else {first}
    return {last}


def _first(tensor: Tensor, dim: int, num_parts: int) -> Tensor:
    return tensor.detach().narrow(dim, 0, -(-tensor.shape[dim] // num_parts))
