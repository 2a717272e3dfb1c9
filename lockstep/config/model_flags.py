"""Megatron's model-shape flags, checked against the HF config that really decides."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lockstep.config.config import Config
from lockstep.config.reporting import flag_of
from lockstep.errors import ModelError

_SAME_NUMBER = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "norm_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "num_experts": "num_experts",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_router_topk": "num_experts_per_tok",
    "moe_shared_expert_intermediate_size": "shared_expert_intermediate_size",
}
"""Option -> key of the HF config with the same number."""

_ONLY_CHOICE = {"normalization": "RMSNorm", "position_embedding_type": "rope", "moe_router_score_function": "softmax"}
"""Option -> its one value for every supported model."""


def check_model_flags(config: Config, hf_config: Mapping[str, Any]) -> None:
    """Compare the given shape flags with the model; flags that were not given are not compared.

    Args:
        hf_config: the content of the checkpoint's config.json.
    Raises:
        ModelError: a flag describes another model.
    """
    options = config.model
    for name, expected, source in _expectations(hf_config):
        given = getattr(options, name)
        if given in (None, False) or given == expected:
            continue
        raise ModelError(
            flag_of(name),
            given,
            f"the HF config in {options.hf_checkpoint} says {source}.",
            "Leave out the model-shape flags (they are never needed), or give the right --hf-checkpoint.",
        )
    _check_positions(config, hf_config)
    _check_moe_layers(config, hf_config)


def _expectations(hf: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """(option, value that agrees with the model, what the HF config says)."""
    for name, key in _SAME_NUMBER.items():
        yield name, hf.get(key, _implied(hf, key)), _says(hf, key)
    for name, value in _ONLY_CHOICE.items():
        yield name, value, f"model_type {hf.get('model_type')}, which has {value}"
    next_generation = hf.get("model_type") == "qwen3_next"
    kind = f"model_type {hf.get('model_type')}"
    for name in ("apply_layernorm_1p", "attention_output_gate", "moe_shared_expert_gate"):
        yield name, next_generation, kind
    yield "qk_layernorm", str(hf.get("model_type")).startswith("qwen3"), kind
    yield "swiglu", hf.get("hidden_act", "silu") == "silu", _says(hf, "hidden_act")
    yield "disable_bias_linear", not hf.get("attention_bias", False), _says(hf, "attention_bias")
    yield "untie_embeddings_and_output_weights", not hf.get("tie_word_embeddings"), _says(hf, "tie_word_embeddings")
    yield "moe_router_pre_softmax", not hf.get("norm_topk_prob", False), _says(hf, "norm_topk_prob")
    grouped = hf.get("num_key_value_heads", 0) < hf.get("num_attention_heads", 0)
    yield "group_query_attention", grouped, _says(hf, "num_key_value_heads")
    rotary = {**hf, **(hf.get("rope_parameters") or {})}
    yield "rotary_base", rotary.get("rope_theta"), _says(rotary, "rope_theta")
    yield "rotary_percent", rotary.get("partial_rotary_factor", 1.0), _says(rotary, "partial_rotary_factor")


def _implied(hf: Mapping[str, Any], key: str) -> Any:
    """The value of a key that HF leaves out when it follows from others."""
    if key == "head_dim" and {"hidden_size", "num_attention_heads"} <= hf.keys():
        return hf["hidden_size"] // hf["num_attention_heads"]
    return None


def _says(hf: Mapping[str, Any], key: str) -> str:
    return f"{key} {hf[key]}" if key in hf else f"nothing of {key}"


def _check_positions(config: Config, hf: Mapping[str, Any]) -> None:
    given, most = config.model.max_position_embeddings, hf.get("max_position_embeddings")
    if given is not None and most is not None and given > most:
        raise ModelError(
            "--max-position-embeddings",
            given,
            f"the model knows positions up to {most}.",
            f"Use {most} or leave it out.",
        )


def _check_moe_layers(config: Config, hf: Mapping[str, Any]) -> None:
    if config.model.moe_layer_freq is None:
        return
    num_layers = int(hf["num_hidden_layers"])
    given = moe_layers(config.model.moe_layer_freq, num_layers)
    step, dense = hf.get("decoder_sparse_step", 1), set(hf.get("mlp_only_layers") or ())
    has_experts = bool(hf.get("num_experts"))
    expected = [int(has_experts and i not in dense and (i + 1) % step == 0) for i in range(num_layers)]
    if given != expected:
        raise ModelError(
            "--moe-layer-freq",
            config.model.moe_layer_freq,
            f"{sum(expected)} of the model's {num_layers} layers are mixtures of experts, and not in these places.",
            "Leave it out: the HF config says which layers are.",
        )


def moe_layers(frequency: list[int] | int | str, num_layers: int) -> list[int]:
    """Megatron's `--moe-layer-freq` as one 0 or 1 per layer.

    A number n makes every n-th layer a mixture of experts, starting with the first; a list is taken as it stands, and
    may be written as a sum of repeated lists: `[0]*1+[1]*47`.

    Raises:
        ModelError: it is none of these.
    """
    if isinstance(frequency, str):
        frequency = int(frequency) if frequency.strip().isdigit() else _read_layer_list(frequency)
    if isinstance(frequency, int):
        return [int(layer % frequency == 0) for layer in range(num_layers)]
    return frequency


def _read_layer_list(text: str) -> list[int]:
    layers: list[int] = []
    for term in text.replace(" ", "").strip("()").split("+"):
        found = re.fullmatch(r"\(?\[([01](?:,[01])*)\]\)?(?:\*(\d+))?", term)
        if found is None:
            raise ModelError(
                "--moe-layer-freq",
                text,
                "it is neither a number nor a list of 0 and 1.",
                "Leave it out, or write [0,1,1], 1 or [0]*1+[1]*47.",
            )
        layers += [int(digit) for digit in found[1].split(",")] * int(found[2] or 1)
    return layers
