"""Qwen3 and Qwen3-MoE: one definition for the trainer and the sampler.

T packed tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lockstep.errors import ModelError
from lockstep.models.layers.attention import Attend, Attention
from lockstep.models.layers.embedding import Embedding
from lockstep.models.layers.mlp import GatedMLP
from lockstep.models.layers.moe import ChooseExperts, MoE, top_k_experts
from lockstep.models.layers.norm import RMSNorm
from lockstep.models.layers.rotary import rotary_tables

_IRRELEVANT = {
    "architectures": "the model type decides",
    "bos_token_id": "the tokenizer's matter",
    "dtype": "--params-dtype decides",
    "eos_token_id": "read by the sampler's stop set",
    "id2label": "no classification head",
    "initializer_range": "weights are loaded, never drawn",
    "label2id": "no classification head",
    "max_window_layers": "only with sliding windows, which are refused",
    "output_attentions": "nothing returns attentions",
    "output_hidden_states": "nothing returns hidden states",
    "output_router_logits": "routes are recorded through their own seam",
    "pad_token_id": "packed rows have no padding",
    "return_dict": "an HF calling convention",
    "router_aux_loss_coef": "RL trains without the auxiliary loss, as slime's recipes (coefficient 0)",
    "sliding_window": "only with use_sliding_window, which is refused",
    "torch_dtype": "--params-dtype decides",
    "transformers_version": "a note of who wrote the file",
    "use_cache": "an HF calling convention",
    "chunk_size_feed_forward": "an HF memory option",
    "is_encoder_decoder": "decoders only",
    "problem_type": "no classification head",
    "_name_or_path": "a note of where the file came from",
}
"""HF config fields that cannot change what the model computes here, each with the reason."""

_CHECKED = ("attention_dropout", "hidden_act", "layer_types", "rope_parameters", "rope_scaling", "use_sliding_window")
"""HF config fields of which one value is computed and every other one refused."""
_DENSE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
_SPARSE = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
"""Fields without which no model is described; HF's defaults for them are of one size only."""
_ONLY_SPARSE = (*_SPARSE, "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")


@dataclass(frozen=True)
class Qwen3Config:
    """Shape of a Qwen3 (`num_experts` 0) or Qwen3-MoE model, named as in HF's config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e4
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Qwen3Config:
        """Read a parsed config.json.

        Raises:
            ModelError: another model type, a missing or unknown field, or a value this definition does not compute.
        """
        hf = dict(hf)
        model_type = hf.get("model_type")
        if model_type not in ("qwen3", "qwen3_moe"):
            raise ModelError(
                "config.json model_type",
                model_type,
                "this definition computes qwen3 and qwen3_moe only.",
                "Give --hf-checkpoint a folder of one of these families.",
            )
        _refuse_what_is_not_computed(hf)
        rope = _rope(hf)
        if "rope_theta" in rope:
            hf["rope_theta"] = rope["rope_theta"]
        if "num_local_experts" in hf:
            hf["num_experts"] = hf.pop("num_local_experts")
        if "mlp_only_layers" in hf:
            hf["mlp_only_layers"] = tuple(hf["mlp_only_layers"] or ())
        for name in ("model_type", *_CHECKED, *_IRRELEVANT):
            hf.pop(name, None)
        is_dense = model_type == "qwen3"
        known = set(cls.__dataclass_fields__) - (set(_ONLY_SPARSE) if is_dense else set())
        for name in sorted(set(hf) - known):
            raise ModelError(
                f"config.json {name}",
                hf[name],
                f"the definition of {model_type} does not know the field, so it might compute something else.",
                "Remove it if it is only a note.",
            )
        if not is_dense and hf.get("num_attention_heads"):
            hf.setdefault("head_dim", hf.get("hidden_size", 0) // hf["num_attention_heads"])
        for name in (*_DENSE, "intermediate_size") if is_dense else (*_DENSE, *_SPARSE):
            if hf.get(name) is None:
                raise ModelError(f"config.json {name}", None, "the field is missing.", "Use the complete config.json.")
        hf.setdefault("intermediate_size", 0)
        config = cls(**hf)
        _require_consistency(config)
        return config

    def is_sparse(self, layer_index: int) -> bool:
        """Whether this layer's feed-forward part is a mixture of experts."""
        return (
            self.num_experts > 0
            and layer_index not in self.mlp_only_layers
            and (layer_index + 1) % self.decoder_sparse_step == 0
        )

    @property
    def num_sparse_layers(self) -> int:
        return sum(self.is_sparse(layer) for layer in range(self.num_hidden_layers))


def _rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the rotary embedding; transformers renamed `rope_scaling` to `rope_parameters`."""
    return {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}


def _refuse_what_is_not_computed(hf: Mapping[str, Any]) -> None:
    rope = _rope(hf)
    checks = {
        "hidden_act": (hf.get("hidden_act", "silu"), "silu", "only SwiGLU layers are computed."),
        "use_sliding_window": (hf.get("use_sliding_window", False), False, "sliding windows are not computed."),
        "attention_dropout": (hf.get("attention_dropout", 0.0), 0.0, "dropout would make log-probs disagree."),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default", "rope scaling is not there yet."),
    }
    for name, (value, wanted, reason) in checks.items():
        if value != wanted:
            raise ModelError(f"config.json {name}", value, reason, f"Use a checkpoint with {name} = {wanted!r}.")
    for name in sorted(set(rope) - {"rope_theta", "rope_type", "type"}):
        raise ModelError(
            f"config.json rope_parameters {name}",
            rope[name],
            "rotary embeddings are computed from rope_theta alone.",
            "Use a checkpoint without it.",
        )
    if any(kind != "full_attention" for kind in hf.get("layer_types") or ()):
        raise ModelError(
            "config.json layer_types",
            hf["layer_types"],
            "only full attention is computed.",
            "Use a checkpoint without sliding windows.",
        )


def _require_consistency(config: Qwen3Config) -> None:
    checks = {
        "num_key_value_heads": (
            config.num_attention_heads % config.num_key_value_heads == 0,
            f"it does not divide the {config.num_attention_heads} attention heads.",
        ),
        "num_experts_per_tok": (
            config.num_experts_per_tok <= config.num_experts,
            f"there are only {config.num_experts} experts.",
        ),
        "head_dim": (config.head_dim % 2 == 0, "rotary embeddings turn pairs of numbers."),
    }
    for name, (is_consistent, reason) in checks.items():
        if not is_consistent:
            raise ModelError(f"config.json {name}", getattr(config, name), reason, "Use the model's own config.json.")


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: Qwen3Config, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.moe_index = sum(config.is_sparse(layer) for layer in range(layer_index))
        self.self_attn = Attention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            bias=config.attention_bias,
            norm_eps=config.rms_norm_eps,
        )
        self.mlp: MoE | GatedMLP
        if config.is_sparse(layer_index):
            self.mlp = MoE(
                config.hidden_size,
                config.moe_intermediate_size,
                config.num_experts,
                config.num_experts_per_tok,
                norm_topk_prob=config.norm_topk_prob,
            )
        else:
            self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x_TD: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, choose_experts: ChooseExperts
    ) -> Tensor:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), self.layer_index, rotary, attend)
        normed_TD = self.post_attention_layernorm(x_TD)
        if isinstance(self.mlp, MoE):
            mixed_TD: Tensor = self.mlp(normed_TD, self.moe_index, choose_experts)
        else:
            mixed_TD = self.mlp(normed_TD)
        return x_TD + mixed_TD


class Decoder(nn.Module):
    """Embedding, blocks and final norm: HF's `model.` prefix."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(i): Block(config, i) for i in range(config.num_hidden_layers)})
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


RunLayer = Callable[..., Tensor]
"""Calls a block with its arguments; the trainer passes one that recomputes activations."""


def run_layer(block: nn.Module, *arguments: Any) -> Tensor:
    output: Tensor = block(*arguments)
    return output


class Qwen3(nn.Module):
    """The language model. `forward` stops at the last hidden states: the vocabulary is projected by a fused kernel."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the projection the embedding again where the config says so (after materialising from meta)."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids_T: Tensor,
        positions_T: Tensor,
        attend: Attend,
        choose_experts: ChooseExperts = top_k_experts,
        run_layer: RunLayer = run_layer,
    ) -> Tensor:
        """Hidden states `[T, D]` after the final norm; row t predicts token t + 1 of its document."""
        x_TD = self.model.embed_tokens(input_ids_T)
        rotary = rotary_tables(positions_T, self.config.head_dim, self.config.rope_theta, x_TD.dtype)
        for block in self.model.layers.values():
            x_TD = run_layer(block, x_TD, rotary, attend, choose_experts)
        hidden_TD: Tensor = self.model.norm(x_TD)
        return hidden_TD


def hf_views(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The HF tensors that one of our parameters holds, each as a view of it.

    Loading copies into the views, export reads them: the mapping is said once. Only the stacked experts differ from HF:
    `experts.gate_up_proj` [E, 2 I, D] holds `experts.{e}.gate_proj.weight` over `experts.{e}.up_proj.weight`.
    """
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        yield name, tensor
        return
    prefix, kind = name.rsplit(".", 1)
    for expert, weight in enumerate(tensor.unbind(0)):
        if kind == "down_proj":
            yield f"{prefix}.{expert}.down_proj.weight", weight
        else:
            gate, up = weight.chunk(2)
            yield f"{prefix}.{expert}.gate_proj.weight", gate
            yield f"{prefix}.{expert}.up_proj.weight", up
