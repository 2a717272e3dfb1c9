"""Qwen3-Next: three layers of gated delta net for each one of gated attention, and experts everywhere.

T packed tokens, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lockstep.models.config import ModelConfig, refuse_layer_types
from lockstep.models.language_model import LanguageModel
from lockstep.models.layers.attention import Attention
from lockstep.models.layers.block import Block
from lockstep.models.layers.gated_delta_net import GatedDeltaNet
from lockstep.models.layers.mixer import TokenMixer
from lockstep.models.layers.norm import ZeroCentredRMSNorm

_ONLY_SPARSE = ("num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
_ATTENTION, _DELTA = "full_attention", "linear_attention"


@dataclass(frozen=True, kw_only=True)
class Qwen3NextConfig(ModelConfig):
    """Shape of a Qwen3-Next model."""

    layer_types: tuple[str, ...]
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int = 4
    shared_expert_intermediate_size: int
    norm_topk_prob: bool = True

    required: ClassVar[tuple[str, ...]] = (
        *ModelConfig.required,
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "num_experts",
        *_ONLY_SPARSE,
    )
    rotates_part: ClassVar[float | None] = 0.25

    @classmethod
    def _settle(cls, hf: dict[str, Any], model_type: str | None) -> None:
        super()._settle(hf, model_type)
        refuse_layer_types(hf, {_ATTENTION, _DELTA})
        interval = hf.pop("full_attention_interval", None) or 4
        if hf.get("num_hidden_layers"):
            numbers = range(1, hf["num_hidden_layers"] + 1)
            from_interval = [_DELTA if number % interval else _ATTENTION for number in numbers]
            hf["layer_types"] = tuple(hf.get("layer_types") or from_interval)
        if hf.get("num_experts") == 0:
            for name in _ONLY_SPARSE:
                hf.setdefault(name, 0)

    @property
    def num_attention_layers(self) -> int:
        return self.layer_types.count(_ATTENTION)

    @property
    def conv_channels(self) -> int:
        """Queries, keys and values of a delta layer."""
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        return 2 * keys + self.linear_num_value_heads * self.linear_value_head_dim

    def _require_consistency(self) -> None:
        super()._require_consistency()
        self._require(
            layer_types=(
                len(self.layer_types) == self.num_hidden_layers,
                f"there are {self.num_hidden_layers} layers.",
            ),
            linear_num_value_heads=(
                self.linear_num_value_heads % self.linear_num_key_heads == 0,
                f"it is no multiple of the {self.linear_num_key_heads} key heads.",
            ),
        )


class Qwen3NextBlock(Block):
    """Gated attention or a gated delta net, as `layer_types` says."""

    def __init__(self, config: Qwen3NextConfig, layer_index: int) -> None:
        norm = ZeroCentredRMSNorm
        super().__init__(config, layer_index, norm=norm, shared_expert_size=config.shared_expert_intermediate_size)
        self.is_attention = config.layer_types[layer_index] == _ATTENTION
        self.index_of_kind = config.layer_types[:layer_index].count(config.layer_types[layer_index])
        if self.is_attention:
            self.self_attn = Attention(
                config.hidden_size,
                config.num_attention_heads,
                config.num_key_value_heads,
                config.head_dim,
                bias=config.attention_bias,
                norm=norm,
                norm_eps=config.rms_norm_eps,
                is_gated=True,
            )
        else:
            self.linear_attn = GatedDeltaNet(
                config.hidden_size,
                config.linear_num_key_heads,
                config.linear_num_value_heads,
                config.linear_key_head_dim,
                config.linear_value_head_dim,
                config.linear_conv_kernel_dim,
                config.rms_norm_eps,
            )

    def mix(self, x_TD: Tensor, rotary: tuple[Tensor, Tensor], mixer: TokenMixer) -> Tensor:
        if self.is_attention:
            mixed_TD: Tensor = self.self_attn(x_TD, self.index_of_kind, rotary, mixer)
        else:
            mixed_TD = self.linear_attn(x_TD, self.index_of_kind, mixer)
        return mixed_TD


class Qwen3Next(LanguageModel):
    """The hybrid. Its multi-token-prediction layer is not computed here: a sampler that speculates may use it."""

    config_class = Qwen3NextConfig
    block_class = Qwen3NextBlock
    norm_class = ZeroCentredRMSNorm
    carried_prefixes = ("mtp.",)
