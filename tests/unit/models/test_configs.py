"""Every field of an HF config.json is used, irrelevant for a stated reason, or refused by name and value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen3Config as HFDense
from transformers import Qwen3MoeConfig as HFSparse
from transformers import Qwen3NextConfig as HFNext

from lockstep.errors import ModelError
from lockstep.models import ModelConfig, Qwen3NextConfig, build_model, read_model_config
from lockstep.models.config import IRRELEVANT
from lockstep.models.layers.rotary import Rope, Yarn

FAMILIES: dict[str, Any] = {"dense": HFDense, "sparse": HFSparse, "next": HFNext}
HF = {family: config().to_dict() for family, config in FAMILIES.items()}

USED: dict[str, tuple[Any, str, Any]] = {
    "vocab_size": (500, "vocab_size", 500),
    "hidden_size": (256, "hidden_size", 256),
    "intermediate_size": (80, "intermediate_size", 80),
    "num_attention_heads": (64, "num_attention_heads", 64),
    "num_key_value_heads": (1, "num_key_value_heads", 1),
    "head_dim": (24, "head_dim", 24),
    "max_position_embeddings": (77, "max_position_embeddings", 77),
    "rms_norm_eps": (1e-5, "rms_norm_eps", 1e-5),
    "tie_word_embeddings": (True, "tie_word_embeddings", True),
    "attention_bias": (True, "attention_bias", True),
}
"""HF field -> a value, our field, what it must hold then."""
USED_IF_SPARSE: dict[str, tuple[Any, str, Any]] = {
    "num_experts_per_tok": (3, "num_experts_per_tok", 3),
    "moe_intermediate_size": (88, "moe_intermediate_size", 88),
    "norm_topk_prob": (True, "norm_topk_prob", True),
    "decoder_sparse_step": (2, "decoder_sparse_step", 2),
    "mlp_only_layers": ([0, 2], "mlp_only_layers", (0, 2)),
    "num_experts": (12, "num_experts", 12),
    "num_local_experts": (12, "num_experts", 12),
}
USED_IN: dict[str, dict[str, tuple[Any, str, Any]]] = {
    "dense": USED | {"num_hidden_layers": (3, "num_hidden_layers", 3)},
    "sparse": USED | USED_IF_SPARSE | {"num_hidden_layers": (3, "num_hidden_layers", 3)},
    "next": USED
    | USED_IF_SPARSE
    | {
        "norm_topk_prob": (False, "norm_topk_prob", False),
        "linear_conv_kernel_dim": (3, "linear_conv_kernel_dim", 3),
        "linear_key_head_dim": (96, "linear_key_head_dim", 96),
        "linear_value_head_dim": (64, "linear_value_head_dim", 64),
        "linear_num_key_heads": (8, "linear_num_key_heads", 8),
        "linear_num_value_heads": (48, "linear_num_value_heads", 48),
        "shared_expert_intermediate_size": (640, "shared_expert_intermediate_size", 640),
    },
}
TESTED_APART = {"model_type", "rope_parameters", "partial_rotary_factor", "layer_types", "num_hidden_layers"}
REFUSED: list[tuple[str, Any]] = [
    ("hidden_act", "gelu"),
    ("use_sliding_window", True),
    ("attention_dropout", 0.1),
    ("layer_types", ["full_attention", "sliding_attention"]),
    ("rope_parameters", {"rope_type": "llama3", "factor": 4.0, "rope_theta": 1e6}),
    ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}),
    ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "long_factor": [1.0]}),
    ("rope_scaling", {"type": "linear", "factor": 2.0}),
    ("rope_scaling", {"mrope_section": [16, 24, 24]}),
    ("model_type", "llama"),
    ("model_type", None),
    ("num_key_value_heads", 5),
    ("head_dim", 7),
    ("unheard_of", 1),
]
"""Values that would change the result and are not computed, in any family."""
REFUSED_IN: list[tuple[str, str, Any]] = [
    ("dense", "rope_parameters", {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}),
    ("dense", "shared_expert_intermediate_size", 64),
    ("sparse", "shared_expert_intermediate_size", 64),
    ("sparse", "qkv_bias", True),
    ("sparse", "use_qk_norm", False),
    ("next", "qkv_bias", False),
    ("sparse", "linear_num_key_heads", 4),
    ("dense", "layer_types", ["linear_attention"]),
    ("next", "layer_types", ["linear_attention"]),
    ("next", "linear_num_value_heads", 24),
    *(("dense", name, value) for name, (value, _, _) in USED_IF_SPARSE.items()),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_that_transformers_writes_is_used_or_refused_or_irrelevant_with_a_reason(family: str) -> None:
    refused = {name for name, _ in REFUSED}
    for name in HF[family]:
        kinds = (name in USED_IN[family], name in refused - set(USED) - TESTED_APART, name in IRRELEVANT)
        assert sum(kinds) == 1 or name in TESTED_APART, name
    assert all(len(reason) > 10 for reason in IRRELEVANT.values())


@pytest.mark.parametrize(("family", "name"), [(f, n) for f in FAMILIES for n in USED_IN[f]])
def test_a_used_field_reaches_the_model(family: str, name: str) -> None:
    value, ours, wanted = USED_IN[family][name]
    hf = HF[family] | {name: value}
    if name == "num_experts":
        hf.pop("num_local_experts", None)
    assert getattr(read_model_config(hf), ours) == wanted
    assert getattr(read_model_config(HF[family]), ours) != wanted


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_a_value_that_is_not_computed_is_refused_by_name(family: str, name: str, value: Any) -> None:
    with pytest.raises(ModelError) as raised:
        read_model_config(HF[family] | {name: value})
    assert name in raised.value.field or name.startswith("rope")
    assert raised.value.remedy


@pytest.mark.parametrize(("family", "name", "value"), REFUSED_IN)
def test_what_one_family_does_not_compute_is_refused_there(family: str, name: str, value: Any) -> None:
    with pytest.raises(ModelError, match=rf"config.json ({name}|num_experts|partial_rotary_factor)"):
        read_model_config(HF[family] | {name: value})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("style", ["rope_parameters", "rope_theta", "rope_scaling"])
def test_rope_is_read_in_every_spelling(family: str, style: str) -> None:
    """Old files have rope_theta and rope_scaling, new ones rope_parameters; Qwen3-Next turns a part of each head."""
    rotary_dim = {"dense": 128, "sparse": 64, "next": 64}[family]
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32768}
    spelled, wanted = {
        "rope_parameters": ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}}, None),
        "rope_theta": ({"rope_theta": 7e5}, None),
        "rope_scaling": ({"rope_theta": 7e5, "rope_scaling": {"type": "yarn", **yarn}}, Yarn(4.0, 32768)),
    }[style]
    hf = {name: value for name, value in HF[family].items() if name != "rope_parameters"} | spelled
    config = read_model_config(hf)
    assert config.rope == Rope(7e5, rotary_dim, wanted)
    if wanted:
        assert config.max_position_embeddings == 131072


def test_the_part_of_a_head_that_is_turned_is_read_from_either_place() -> None:
    assert (
        read_model_config(HF["next"] | {"partial_rotary_factor": 0.5}).rope.rotary_dim == 64
    )  # beside rope_parameters
    without = {name: value for name, value in HF["next"].items() if name != "rope_parameters"}
    assert read_model_config(without | {"partial_rotary_factor": 0.5}).rope.rotary_dim == 128
    inside = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.125}}
    assert read_model_config(without | inside).rope.rotary_dim == 32


def test_more_experts_per_token_than_experts_are_refused() -> None:
    with pytest.raises(ModelError, match="only 4 experts"):
        read_model_config(HF["sparse"] | {"num_local_experts": 4})


@pytest.mark.parametrize(("family", "name"), [(f, n) for f in FAMILIES for n in sorted(HF[f])])
def test_a_field_left_out_means_what_transformers_takes_it_for_or_is_refused(family: str, name: str) -> None:
    """config.json may omit what equals HF's default."""
    shorter = {k: v for k, v in HF[family].items() if k != name}
    try:
        ours = read_model_config(shorter)
    except ModelError as error:
        assert "missing" in error.reason or name == "model_type"  # noqa: PT017
        return
    theirs = FAMILIES[family](**{k: v for k, v in shorter.items() if k not in ("model_type", "transformers_version")})
    wanted = read_model_config(theirs.to_dict())
    assert ours == wanted or (name == "intermediate_size" and wanted.num_sparse_layers == wanted.num_hidden_layers)


def test_experts_sit_where_transformers_puts_them() -> None:
    changes = {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    config = read_model_config(HF["sparse"] | changes)
    assert [config.is_sparse(layer) for layer in range(6)] == [False, True, False, False, False, True]
    assert config.num_sparse_layers == 2


@pytest.mark.parametrize("changes", [{}, {"full_attention_interval": 3}, {"layer_types": None}])
def test_attention_sits_where_transformers_puts_it(changes: dict[str, Any]) -> None:
    """`layer_types` decides; a file without it is counted by its interval."""
    hf = {name: value for name, value in HF["next"].items() if name != "layer_types"} | {"num_hidden_layers": 7}
    config: ModelConfig = read_model_config(hf | changes)
    assert isinstance(config, Qwen3NextConfig)
    theirs = HFNext(num_hidden_layers=7, **changes)
    assert list(config.layer_types) == theirs.layer_types
    assert config.num_attention_layers == theirs.layer_types.count("full_attention")
    assert config.num_attention_layers + config.num_delta_layers == 7


def test_the_published_80b_config_is_read() -> None:
    """Fields and values as the model's config.json has them."""
    config = read_model_config(
        {
            "architectures": ["Qwen3NextForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "decoder_sparse_step": 1,
            "full_attention_interval": 4,
            "head_dim": 256,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 5120,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_value_head_dim": 128,
            "max_position_embeddings": 262144,
            "mlp_only_layers": [],
            "model_type": "qwen3_next",
            "moe_intermediate_size": 512,
            "norm_topk_prob": True,
            "num_attention_heads": 16,
            "num_experts": 512,
            "num_experts_per_tok": 10,
            "num_hidden_layers": 48,
            "num_key_value_heads": 2,
            "output_router_logits": False,
            "partial_rotary_factor": 0.25,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 10000000,
            "router_aux_loss_coef": 0.001,
            "shared_expert_intermediate_size": 512,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
            "vocab_size": 151936,
        }
    )
    assert isinstance(config, Qwen3NextConfig)
    assert (config.num_attention_layers, config.num_delta_layers, config.conv_channels) == (12, 36, 8192)
    assert config.rope == Rope(1e7, 64)


def test_what_the_files_of_qwen3_coder_say_besides_is_accepted() -> None:
    coder = HF["sparse"] | {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0}
    assert read_model_config(coder) == read_model_config(HF["sparse"])


@pytest.mark.parametrize("family", ["sparse", "next"])
def test_without_experts_every_layer_is_dense_whatever_the_experts_would_be(family: str) -> None:
    """transformers writes the fields of experts that are not there as well."""
    hf = HF[family] | {"num_experts": 0, "num_local_experts": 0}
    if "num_experts" in HF[family]:
        del hf["num_local_experts"]
    assert hf["num_experts_per_tok"] > 0
    assert read_model_config(hf).num_sparse_layers == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_value_of_the_wrong_kind_is_refused_by_name_before_a_model_is_built(family: str) -> None:
    """One field at a time is damaged; what is not refused must describe a model that can be built."""
    smaller = {"vocab_size": 32, "num_hidden_layers": 4, "layer_types": None, "num_experts": 4, "num_local_experts": 4}
    kept = {name: value for name, value in smaller.items() if name in HF[family]}
    base = HF[family] | kept | ({"num_experts_per_tok": 2} if family != "dense" else {})
    for name in base:
        for damaged in (None, "x", -1, 0, 1.5, float("nan"), [], {}, [1], ["a"], {"a": 1}, True):
            try:
                config = read_model_config(base | {name: damaged})
            except ModelError as error:
                assert "config.json" in error.field  # noqa: PT017
                continue
            with torch.device("meta"):
                build_model(config)
