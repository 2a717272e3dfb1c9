"""What one rank holds of every parameter, as tensors without memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from lockstep.models import ModelConfig, build_model
from lockstep.models.layers.moe import Experts, Router
from lockstep.models.layers.norm import RMSNorm
from lockstep.parallel.mesh import Layout

Parameters = dict[str, Tensor]
"""Tensors on the meta device by name."""


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
    divided = {name: _divided(module, name) for module, name in _owners(model)}
    stages = []
    for number, layers in enumerate(layout.stage_layers(config.num_hidden_layers)):
        stored, gathered = {}, {}
        for name, parameter in model.named_parameters():
            if name.startswith("model.layers."):
                is_here = int(name.split(".")[2]) in layers
            else:
                is_here = number in _stages_outside_layers(name, config, layout)
            if is_here:
                by_tensor, by_fsdp = _divisors(divided[name], layout)
                gathered[name] = _first_rows(parameter, by_tensor)
                stored[name] = _first_rows(parameter, by_tensor * by_fsdp)
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


def _divided(module: nn.Module, name: str) -> str:
    """Over what the parameter is divided beside FSDP."""
    if isinstance(module, Experts):
        return "experts"
    whole = isinstance(module, Router | RMSNorm) or name.endswith("shared_expert_gate.weight")
    return "nothing" if whole else "tensor"


def _divisors(kind: str, layout: Layout) -> tuple[int, int]:
    if kind == "experts":
        return layout.ep_size * layout.etp_size, layout.expert_dp_size
    return (layout.tp_size if kind == "tensor" else 1), layout.dp_size * layout.cp_size


def _stages_outside_layers(name: str, config: ModelConfig, layout: Layout) -> set[int]:
    """Where an embedding, the final norm or the head is; tied embeddings are on the first and on the last stage."""
    first, last = 0, layout.pp_size - 1
    if name.startswith("model.embed_tokens."):
        return {first, last} if config.tie_word_embeddings else {first}
    return {last}


def _first_rows(parameter: Tensor, share: int) -> Tensor:
    return parameter[: -(-parameter.shape[0] // share)].detach()
