"""Qwen3 and Qwen3-MoE: one definition for the trainer and the sampler.

T packed tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lockstep.errors import ModelError
from lockstep.models.config import ModelConfig, refuse_layer_types
from lockstep.models.language_model import LanguageModel
from lockstep.models.layers.attention import Attention
from lockstep.models.layers.block import Block
from lockstep.models.layers.mixer import TokenMixer
from lockstep.models.layers.norm import RMSNorm

_SPARSE = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
_ONLY_SPARSE = (*_SPARSE, "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(ModelConfig):
    """Shape of a Qwen3 (`num_experts` 0) or Qwen3-MoE model."""

    checked: ClassVar[Mapping[str, tuple[Any, str]]] = {
        **ModelConfig.checked,
        "qkv_bias": (False, "attention_bias says which projections have one."),
        "use_qk_norm": (True, "queries and keys are normed."),
        "shared_expert_intermediate_size": (0, "the definition has no shared expert."),
    }
    """The last three stand in the files of Qwen3-Coder."""

    @classmethod
    def _settle(cls, hf: dict[str, Any], model_type: str | None) -> None:
        refuse_layer_types(hf, {"full_attention"})
        hf.pop("layer_types", None)
        if model_type == "qwen3":
            for name in _ONLY_SPARSE:
                if name in hf:
                    raise ModelError(
                        f"config.json {name}",
                        hf[name],
                        "the definition of qwen3 has no experts.",
                        "Remove it if it is only a note; a mixture of experts is a qwen3_moe.",
                    )
            return
        super()._settle(hf, model_type)
        for name in _SPARSE:
            if hf.get(name) is None:
                raise ModelError(f"config.json {name}", None, "the field is missing.", "Use the complete config.json.")
        if hf.get("num_attention_heads"):
            hf.setdefault("head_dim", hf.get("hidden_size", 0) // hf["num_attention_heads"])
        hf.setdefault("intermediate_size", 0)


class Qwen3Block(Block):
    """Attention in every layer."""

    def __init__(self, config: Qwen3Config, layer_index: int) -> None:
        super().__init__(config, layer_index, norm=RMSNorm)
        self.layer_index = layer_index
        self.self_attn = Attention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            bias=config.attention_bias,
            norm=RMSNorm,
            norm_eps=config.rms_norm_eps,
        )

    def mix(self, x_TD: Tensor, rotary: tuple[Tensor, Tensor], mixer: TokenMixer) -> Tensor:
        mixed_TD: Tensor = self.self_attn(x_TD, self.layer_index, rotary, mixer)
        return mixed_TD


class Qwen3(LanguageModel):
    """The dense and the sparse model; `config.is_sparse` says which layers have experts."""

    config_class = Qwen3Config
    block_class = Qwen3Block
    norm_class = RMSNorm
