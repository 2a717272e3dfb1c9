"""The shape of a model, read from HF's config.json: every field is used, irrelevant for a stated reason, or refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from lockstep.errors import ModelError
from lockstep.models.layers.rotary import Rope, Yarn

IRRELEVANT = {
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
    "quantization_config": "how weights are stored; loading reads it, or refuses it by name",
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
"""HF config fields that cannot change what any family computes here, each with the reason."""

_ZERO_IS_NONE = (
    "intermediate_size",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)
_OTHER_KINDS = {
    "full_attention_interval": "int",
    "partial_rotary_factor": "share",
    "rope_theta": "float",
    "rope_scaling": "table",
    "rope_parameters": "table",
    "mlp_only_layers": "numbers",
    "layer_types": "names",
}
_YARN_KINDS = {
    "factor": "float",
    "original_max_position_embeddings": "int",
    "attention_factor": "float",
    "beta_fast": "float",
    "beta_slow": "float",
    "mscale": "float",
    "mscale_all_dim": "float",
    "truncate": "bool",
    "rope_theta": "float",
    "partial_rotary_factor": "share",
}
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "int": (lambda value: _is_int(value) and 1 <= value < 2**31, "it must be a whole number from 1."),
    "count": (lambda value: _is_int(value) and value >= 0, "it must be a whole number from 0."),
    "float": (lambda value: _is_number(value) and 0 < value < math.inf, "it must be a number above 0."),
    "share": (lambda value: _is_number(value) and 0 < value <= 1, "it must be a number above 0, at most 1."),
    "bool": (lambda value: isinstance(value, bool), "it must be true or false."),
    "table": (lambda value: isinstance(value, Mapping), "it must be an object with the settings by name."),
    "numbers": (
        lambda value: isinstance(value, list | tuple) and all(_is_int(item) and item >= 0 for item in value),
        "it must be a list of layer numbers.",
    ),
    "names": (
        lambda value: isinstance(value, list | tuple) and all(isinstance(item, str) for item in value),
        "it must be a list with a kind for every layer.",
    ),
}
"""Kind of a field -> what its values have to be."""

_ROPE_FIELDS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What all families have in common, named as in HF's config.json; `num_experts` 0 is a dense model."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rope: Rope
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    """With yarn, what its factor reaches."""
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    checked: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "hidden_act": ("silu", "only SwiGLU layers are computed."),
        "use_sliding_window": (False, "sliding windows are not computed."),
        "attention_dropout": (0.0, "dropout would make log-probs disagree."),
    }
    """HF config fields of which one value is computed and every other one refused."""
    required: ClassVar[tuple[str, ...]] = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
    )
    """Fields without which no model is described; HF's defaults for them are of one size only."""
    rotates_part: ClassVar[float | None] = None
    """HF's default of `partial_rotary_factor`; None where the family turns whole heads only."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        """Read a parsed config.json.

        Raises:
            ModelError: a missing or unknown field, or a value this definition does not compute.
        """
        hf = {name: value for name, value in hf.items() if name not in IRRELEVANT}
        model_type = hf.pop("model_type", None)
        for name, (computed, reason) in cls.checked.items():
            if (value := hf.pop(name, computed)) != computed:
                raise ModelError(f"config.json {name}", value, reason, f"Use a checkpoint with {name} = {computed!r}.")
        if "num_local_experts" in hf:
            hf["num_experts"] = hf.pop("num_local_experts")
        hf = {name: _checked(name, value, cls._kind(name)) for name, value in hf.items() if value is not None}
        cls._settle(hf, model_type)
        for name in cls.required:
            if hf.get(name) is None:
                raise ModelError(f"config.json {name}", None, "the field is missing.", "Use the complete config.json.")
        hf["rope"] = rope = _rope(hf, cls.rotates_part)
        if rope.yarn is not None:
            reached = round(rope.yarn.factor * rope.yarn.original_max_position_embeddings)
            hf["max_position_embeddings"] = max(hf.get("max_position_embeddings") or 0, reached)
        for name in sorted(set(hf) - set(cls.__dataclass_fields__)):
            raise ModelError(
                f"config.json {name}",
                hf[name],
                f"the definition of {model_type} does not know the field, so it might compute something else.",
                "Remove it if it is only a note.",
            )
        config = cls(**hf)
        config._require_consistency()
        return config

    @classmethod
    def _kind(cls, name: str) -> str:
        """How the value of an HF field has to look: a key of `_KINDS`, or nothing that is known here."""
        if name in _ZERO_IS_NONE:
            return "count"
        return _OTHER_KINDS.get(name) or str(getattr(cls.__dataclass_fields__.get(name), "type", ""))

    @classmethod
    def _settle(cls, hf: dict[str, Any], model_type: str | None) -> None:
        """Fill in the family's own defaults, and refuse its own values, before the common reading."""
        hf["mlp_only_layers"] = tuple(hf.get("mlp_only_layers") or ())

    @property
    def num_attention_layers(self) -> int:
        """Layers with keys and values to cache."""
        return self.num_hidden_layers

    @property
    def num_delta_layers(self) -> int:
        """Layers with a recurrent state instead."""
        return self.num_hidden_layers - self.num_attention_layers

    @property
    def num_sparse_layers(self) -> int:
        return sum(self.is_sparse(layer) for layer in range(self.num_hidden_layers))

    def is_sparse(self, layer_index: int) -> bool:
        """Whether this layer's feed-forward part is a mixture of experts."""
        return (
            self.num_experts > 0
            and layer_index not in self.mlp_only_layers
            and (layer_index + 1) % self.decoder_sparse_step == 0
        )

    def _require_consistency(self) -> None:
        self._require(
            num_key_value_heads=(
                self.num_attention_heads % self.num_key_value_heads == 0,
                f"it does not divide the {self.num_attention_heads} attention heads.",
            ),
            num_experts_per_tok=(
                self.num_experts == 0 or 1 <= self.num_experts_per_tok <= self.num_experts,
                f"there are only {self.num_experts} experts.",
            ),
            intermediate_size=(
                self.intermediate_size > 0 or self.num_sparse_layers == self.num_hidden_layers,
                "some layers are dense and need a width.",
            ),
            moe_intermediate_size=(
                self.moe_intermediate_size > 0 or self.num_sparse_layers == 0,
                "experts need a width.",
            ),
            head_dim=(self.rope.rotary_dim % 2 == 0, "rotary embeddings turn pairs of numbers."),
        )

    def _require(self, **checks: tuple[bool, str]) -> None:
        for name, (is_consistent, reason) in checks.items():
            if not is_consistent:
                value = getattr(self, name)
                raise ModelError(f"config.json {name}", value, reason, "Use the model's own config.json.")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _checked(name: str, value: Any, kind: str) -> Any:
    is_right, reason = _KINDS.get(kind, (lambda _: True, ""))
    if not is_right(value):
        raise ModelError(f"config.json {name}", value, reason, "Use the model's own config.json.")
    return value


def refuse_layer_types(hf: dict[str, Any], computed: set[str]) -> None:
    """Stop at a kind of layer that the family does not compute.

    Raises:
        ModelError: naming the kinds that it does.
    """
    if unknown := set(hf.get("layer_types") or ()) - computed:
        raise ModelError(
            "config.json layer_types",
            sorted(unknown),
            f"only {' and '.join(sorted(computed))} is computed.",
            "Use a checkpoint without other layers (sliding windows among them).",
        )


def _rope(hf: dict[str, Any], rotates_part: float | None) -> Rope:
    """Settings of the rotary embedding; transformers renamed `rope_scaling` to `rope_parameters`."""
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    rope = {
        name: _checked(f"rope_parameters {name}", value, _YARN_KINDS.get(name, ""))
        for name, value in rope.items()
        if value is not None
    }
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    theta = rope.pop("rope_theta", None) or hf.get("rope_theta") or 1e4
    part = rope.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor") or rotates_part or 1.0
    for name in _ROPE_FIELDS:
        hf.pop(name, None)
    if kind not in ("default", "yarn"):
        raise ModelError(
            "config.json rope_type", kind, "only default and yarn are computed.", "Use a checkpoint with one of them."
        )
    if part != 1.0 and rotates_part is None:
        raise ModelError(
            "config.json partial_rotary_factor",
            part,
            "this family turns whole heads.",
            "Use a checkpoint without it.",
        )
    for name in sorted(set(rope) - set(_YARN_KINDS if kind == "yarn" else ())):
        raise ModelError(
            f"config.json rope_parameters {name}",
            rope[name],
            f"rotary embeddings of type {kind} are computed without it.",
            "Use a checkpoint without it.",
        )
    yarn = None
    if kind == "yarn":
        rope.setdefault("original_max_position_embeddings", hf.get("max_position_embeddings", 32768))
        if not rope.get("factor") or rope["factor"] < 1:
            raise ModelError(
                "config.json rope_parameters factor",
                rope.get("factor"),
                "yarn needs the factor, 1 or more, by which it stretches the context.",
                'Add it, as in {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}.',
            )
        yarn = Yarn(**rope)
    return Rope(theta=float(theta), rotary_dim=int(hf["head_dim"] * part), yarn=yarn)
