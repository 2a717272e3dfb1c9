"""Which HF tensors are which of Megatron-Core's, written once as tables and played both ways.

Names are those of megatron-core 0.16 with Transformer Engine's layers, whose linear layers own the norm before them.
The local layers' names are read, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache, cached_property

import torch

from lockstep.checkpoint.megatron.layouts import (
    DeltaProjections,
    GateOverUp,
    GroupedHeads,
    Layout,
    MinusOne,
    Same,
    SplitRows,
    Vocabulary,
)
from lockstep.models.config import ModelConfig
from lockstep.models.qwen3_next import Qwen3NextConfig

VOCABULARY_MULTIPLE = 128
"""Megatron's default of `--make-vocab-size-divisible-by`; a run at another tensor parallel size pads anew by itself."""

TIED_HEAD = "lm_head.weight"
MTP_PREFIX = "mtp."

ALSO_READ = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.in_proj.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""Name of a tensor that is written -> the name that another layer spec gives it."""


@dataclass(frozen=True, eq=False)
class Row:
    """A line of the tables: HF names with their shapes in the letters of `_dims`, and Megatron's names."""

    hf: dict[str, str]
    megatron: tuple[str, ...]
    layout: str = "same"


_TOP = (
    Row({"model.embed_tokens.weight": "V D"}, ("embedding.word_embeddings.weight",), "embedding"),
    Row({"model.norm.weight": "D"}, ("decoder.final_layernorm.weight",)),
)
_HEAD = (Row({TIED_HEAD: "V D"}, ("output_layer.weight",), "head"),)
_ATTENTION = (
    Row({"input_layernorm.weight": "D"}, ("self_attention.linear_qkv.layer_norm_weight",)),
    Row(
        {"self_attn.q_proj.weight": "Q D", "self_attn.k_proj.weight": "KH D", "self_attn.v_proj.weight": "KH D"},
        ("self_attention.linear_qkv.weight",),
        "heads",
    ),
    Row({"self_attn.q_norm.weight": "H"}, ("self_attention.q_layernorm.weight",)),
    Row({"self_attn.k_norm.weight": "H"}, ("self_attention.k_layernorm.weight",)),
    Row({"self_attn.o_proj.weight": "D NH"}, ("self_attention.linear_proj.weight",)),
)
_ATTENTION_BIAS = (
    Row(
        {"self_attn.q_proj.bias": "Q", "self_attn.k_proj.bias": "KH", "self_attn.v_proj.bias": "KH"},
        ("self_attention.linear_qkv.bias",),
        "heads",
    ),
    Row({"self_attn.o_proj.bias": "D"}, ("self_attention.linear_proj.bias",)),
)
_DELTA = (
    Row({"input_layernorm.weight": "D"}, ("self_attention.in_proj.layer_norm_weight",)),
    Row(
        {"linear_attn.in_proj_qkvz.weight": "QKVZ D", "linear_attn.in_proj_ba.weight": "BA D"},
        tuple(f"self_attention.in_proj.weight.{piece}" for piece in ("query", "key", "value", "z", "beta", "alpha")),
        "delta",
    ),
    Row(
        {"linear_attn.conv1d.weight": "QKV 1 W"},
        tuple(f"self_attention.conv1d.weight.{piece}" for piece in ("query", "key", "value")),
        "conv",
    ),
    Row({"linear_attn.A_log": "VH"}, ("self_attention.A_log",)),
    Row({"linear_attn.dt_bias": "VH"}, ("self_attention.dt_bias",)),
    Row({"linear_attn.norm.weight": "VD"}, ("self_attention.out_norm.weight",), "minus_one"),
    Row({"linear_attn.out_proj.weight": "D VHVD"}, ("self_attention.out_proj.weight",)),
)
_DENSE = (
    Row({"post_attention_layernorm.weight": "D"}, ("mlp.linear_fc1.layer_norm_weight",)),
    Row({"mlp.gate_proj.weight": "F D", "mlp.up_proj.weight": "F D"}, ("mlp.linear_fc1.weight",), "gate_over_up"),
    Row({"mlp.down_proj.weight": "D F"}, ("mlp.linear_fc2.weight",)),
)
_SPARSE = (
    Row({"post_attention_layernorm.weight": "D"}, ("pre_mlp_layernorm.weight",)),
    Row({"mlp.gate.weight": "E D"}, ("mlp.router.weight",)),
)
_EXPERT = (
    Row({"gate_proj.weight": "M D", "up_proj.weight": "M D"}, ("linear_fc1.weight",), "gate_over_up"),
    Row({"down_proj.weight": "D M"}, ("linear_fc2.weight",)),
)
_SHARED_EXPERT = (
    Row(
        {"mlp.shared_expert.gate_proj.weight": "S D", "mlp.shared_expert.up_proj.weight": "S D"},
        ("mlp.shared_experts.linear_fc1.weight",),
        "gate_over_up",
    ),
    Row({"mlp.shared_expert.down_proj.weight": "D S"}, ("mlp.shared_experts.linear_fc2.weight",)),
    Row({"mlp.shared_expert_gate.weight": "1 D"}, ("mlp.shared_experts.gate_weight",)),
)
_MTP = (
    Row({"mtp.pre_fc_norm_embedding.weight": "D"}, ("mtp.layers.0.enorm.weight",)),
    Row({"mtp.pre_fc_norm_hidden.weight": "D"}, ("mtp.layers.0.hnorm.weight",)),
    Row({"mtp.fc.weight": "D 2D"}, ("mtp.layers.0.eh_proj.weight",)),
    Row({"mtp.norm.weight": "D"}, ("mtp.layers.0.final_layernorm.weight",)),
)
"""The layer that predicts a second token; HF has one at most."""

_WITHOUT_EXTRA_STATE = ("embedding.word_embeddings", "output_layer", "mlp.router", "self_attention.conv1d")


@dataclass(frozen=True)
class Place:
    """Where Megatron keeps a tensor: below `block`, in a layer of several, as one of several experts."""

    name: str
    shape: tuple[int, ...]
    block: str = ""
    layer: tuple[int, int] | None = None
    """Index and number of the layers, where Megatron may stack them."""
    expert: tuple[int, int] | None = None
    """Index and number of the experts, which Megatron stacks; the names say `experts.experts`."""

    def key(self, *, stacks_layers: bool, name: str | None = None) -> str:
        """The name in the checkpoint; `name` in place of the one that is written."""
        parts = [self.block] if self.block else []
        if self.layer and not stacks_layers:
            parts.append(str(self.layer[0]))
        return ".".join([*parts, name or self.name])

    def lead(self, *, stacks_layers: bool) -> tuple[tuple[int, int], ...]:
        """(index, size) of the axes before the tensor's own."""
        return tuple(axis for axis in (self.layer if stacks_layers else None, self.expert) if axis)

    @property
    def module_name(self) -> str | None:
        """The layer of Transformer Engine that owns the tensor, and has a state of its own; None for other layers."""
        module, found, _ = self.name.partition(".weight")
        return module if found and module not in _WITHOUT_EXTRA_STATE else None


@dataclass(frozen=True)
class Unit:
    """The smallest set of tensors that can be converted alone."""

    hf: dict[str, tuple[int, ...]]
    places: tuple[Place, ...]
    layout: Layout


@dataclass(frozen=True)
class Mapping:
    """All tensors of a model on both sides.

    Args:
        has_mtp: whether the layer that predicts a second token is there; config.json does not say.
        has_tied_head: whether the HF folder stores a head that is tied to the embedding.
    """

    config: ModelConfig
    has_mtp: bool = False
    has_tied_head: bool = False

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        return tuple(self._all_units())

    @classmethod
    def of_hf_names(cls, config: ModelConfig, names: Collection[str]) -> Mapping:
        """The mapping of a folder with these tensors."""
        has_mtp = any(name.startswith(MTP_PREFIX) for name in names)
        return cls(config, has_mtp=has_mtp, has_tied_head=config.tie_word_embeddings and TIED_HEAD in names)

    @property
    def stacks_layers(self) -> bool:
        """Whether Megatron stacks the layers: where all are alike, and no list says which have experts."""
        return self.config.num_experts == 0 and not isinstance(self.config, Qwen3NextConfig)

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every HF tensor with its shape."""
        return {name: shape for unit in self.units for name, shape in unit.hf.items()}

    def _all_units(self) -> Iterator[Unit]:
        config, count = self.config, self.config.num_hidden_layers
        yield from (self._unit(row) for row in _TOP)
        if not config.tie_word_embeddings:
            yield from (self._unit(row) for row in _HEAD)
        for index in range(count):
            is_delta = isinstance(config, Qwen3NextConfig) and config.layer_types[index] == "linear_attention"
            yield from self._layer(
                f"model.layers.{index}.",
                "decoder.layers",
                (index, count),
                is_delta=is_delta,
                is_sparse=config.is_sparse(index),
            )
        if self.has_mtp:
            yield from (self._unit(row) for row in _MTP)
            block = "mtp.layers.0.transformer_layer"
            yield from self._layer("mtp.layers.0.", block, None, is_delta=False, is_sparse=config.num_experts > 0)

    def _layer(
        self, prefix: str, block: str, layer: tuple[int, int] | None, *, is_delta: bool, is_sparse: bool
    ) -> Iterator[Unit]:
        config = self.config
        rows: tuple[Row, ...] = _DELTA if is_delta else _ATTENTION
        if config.attention_bias and not is_delta:
            rows += _ATTENTION_BIAS
        rows += _SPARSE if is_sparse else _DENSE
        if is_sparse and isinstance(config, Qwen3NextConfig):
            rows += _SHARED_EXPERT
        yield from (self._unit(row, prefix, block=block, layer=layer) for row in rows)
        for expert in range(config.num_experts if is_sparse else 0):
            for row in _EXPERT:
                yield self._unit(
                    row,
                    f"{prefix}mlp.experts.{expert}.",
                    "mlp.experts.experts.",
                    block=block,
                    layer=layer,
                    expert=(expert, config.num_experts),
                )

    def _unit(
        self,
        row: Row,
        hf_prefix: str = "",
        name_prefix: str = "",
        *,
        block: str = "",
        layer: tuple[int, int] | None = None,
        expert: tuple[int, int] | None = None,
    ) -> Unit:
        hf_shapes, shapes, layout = self._sized(row)
        places = (
            Place(name_prefix + name, shape, block, layer, expert)
            for name, shape in zip(row.megatron, shapes, strict=True)
        )
        return Unit({hf_prefix + name: shape for name, shape in hf_shapes.items()}, tuple(places), layout)

    @cache  # noqa: B019 (there are two mappings in a process at most)
    def _sized(self, row: Row) -> tuple[dict[str, tuple[int, ...]], list[tuple[int, ...]], Layout]:
        """The shapes on both sides, and the way between them."""
        dims, layout = self._dims(), self._layout(row.layout)
        hf = {name: tuple(dims[letters] for letters in shape.split()) for name, shape in row.hf.items()}
        if row.layout == "embedding" and self.has_tied_head:
            hf[TIED_HEAD] = next(iter(hf.values()))
        tensors = layout.to_megatron([torch.empty(shape, device="meta") for shape in hf.values()])
        return hf, [tuple(tensor.shape) for tensor in tensors], layout

    def _dims(self) -> dict[str, int]:
        """Sizes by the letters of the tables."""
        config = self.config
        heads = config.num_attention_heads * config.head_dim
        dims = {
            "1": 1,
            "V": config.vocab_size,
            "D": config.hidden_size,
            "2D": 2 * config.hidden_size,
            "H": config.head_dim,
            "NH": heads,
            "Q": 2 * heads if self._is_gated else heads,
            "KH": config.num_key_value_heads * config.head_dim,
            "F": config.intermediate_size,
            "E": config.num_experts,
            "M": config.moe_intermediate_size,
        }
        if isinstance(config, Qwen3NextConfig):
            keys = config.linear_num_key_heads * config.linear_key_head_dim
            values = config.linear_num_value_heads * config.linear_value_head_dim
            dims |= {
                "S": config.shared_expert_intermediate_size,
                "QKVZ": 2 * keys + 2 * values,
                "BA": 2 * config.linear_num_value_heads,
                "QKV": 2 * keys + values,
                "W": config.linear_conv_kernel_dim,
                "VH": config.linear_num_value_heads,
                "VD": config.linear_value_head_dim,
                "VHVD": values,
            }
        return dims

    def _layout(self, name: str) -> Layout:
        config = self.config
        match name:
            case "same":
                return Same()
            case "gate_over_up":
                return GateOverUp()
            case "heads":
                return GroupedHeads(config.num_key_value_heads, config.head_dim, self._is_gated)
            case "embedding":
                return Vocabulary(config.vocab_size, VOCABULARY_MULTIPLE, self.has_tied_head)
            case "head":
                return Vocabulary(config.vocab_size, VOCABULARY_MULTIPLE)
            case "minus_one":
                return MinusOne()
        assert isinstance(config, Qwen3NextConfig), "only its layers have the other layouts"
        if name == "delta":
            return DeltaProjections(config.linear_num_key_heads, config.linear_key_head_dim)
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        return SplitRows((keys, keys, config.linear_num_value_heads * config.linear_value_head_dim))

    @property
    def _is_gated(self) -> bool:
        return isinstance(self.config, Qwen3NextConfig)
