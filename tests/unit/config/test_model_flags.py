from __future__ import annotations

import pytest

from lockstep.config import Config
from lockstep.config.model_flags import check_model_flags, moe_layers
from lockstep.errors import ModelError

QWEN3_30B = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
    "num_experts": 128,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 40960,
}
QWEN3_NEXT = QWEN3_30B | {
    "model_type": "qwen3_next",
    "partial_rotary_factor": 0.25,
    "shared_expert_intermediate_size": 512,
    "rope_parameters": {"rope_theta": 10000000},
}
AGREEING = {
    "num_layers": 48,
    "hidden_size": 2048,
    "ffn_hidden_size": 6144,
    "num_attention_heads": 32,
    "group_query_attention": True,
    "num_query_groups": 4,
    "kv_channels": 128,
    "qk_layernorm": True,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-6,
    "rotary_base": 1000000,
    "swiglu": True,
    "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
    "vocab_size": 151936,
    "num_experts": 128,
    "moe_ffn_hidden_size": 768,
    "moe_router_topk": 8,
    "moe_layer_freq": "[" + ",".join(["1"] * 48) + "]",
    "moe_router_score_function": "softmax",
    "max_position_embeddings": 40960,
    "rotary_percent": 1.0,
    "position_embedding_type": "rope",
}


def check(hf: dict, **flags: object) -> None:
    check_model_flags(Config.from_dict({"hf_checkpoint": "model", **flags}), hf)


def test_flags_that_agree_pass():
    check(QWEN3_30B)
    check(QWEN3_30B, **AGREEING)
    check(
        QWEN3_NEXT,
        attention_output_gate=True,
        apply_layernorm_1p=True,
        moe_shared_expert_gate=True,
        moe_shared_expert_intermediate_size=512,
        rotary_percent=0.25,
        rotary_base=10000000,
    )


@pytest.mark.parametrize(
    ("flag", "value", "hf_says"),
    [
        ("num_layers", 36, "num_hidden_layers 48"),
        ("hidden_size", 4096, "hidden_size 2048"),
        ("ffn_hidden_size", 1, "intermediate_size 6144"),
        ("num_attention_heads", 16, "num_attention_heads 32"),
        ("num_query_groups", 8, "num_key_value_heads 4"),
        ("kv_channels", 64, "head_dim 128"),
        ("norm_epsilon", 1e-5, "rms_norm_eps 1e-06"),
        ("rotary_base", 10000, "rope_theta 1000000.0"),
        ("rotary_percent", 0.25, "nothing of partial_rotary_factor"),
        ("vocab_size", 151669, "vocab_size 151936"),
        ("num_experts", 512, "num_experts 128"),
        ("moe_ffn_hidden_size", 512, "moe_intermediate_size 768"),
        ("moe_router_topk", 10, "num_experts_per_tok 8"),
        ("moe_router_pre_softmax", True, "norm_topk_prob True"),
        ("moe_router_score_function", "sigmoid", "which has softmax"),
        ("normalization", "LayerNorm", "which has RMSNorm"),
        ("position_embedding_type", "none", "which has rope"),
        ("attention_output_gate", True, "model_type qwen3_moe"),
        ("apply_layernorm_1p", True, "model_type qwen3_moe"),
        ("moe_shared_expert_gate", True, "model_type qwen3_moe"),
        ("moe_shared_expert_intermediate_size", 512, "nothing of shared_expert_intermediate_size"),
        ("moe_layer_freq", "[0]*1+[1]*47", "48 of the model's 48 layers"),
        ("moe_layer_freq", 2, "48 of the model's 48 layers"),
        ("max_position_embeddings", 50000, "up to 40960"),
    ],
)
def test_a_flag_of_another_model_is_refused(flag, value, hf_says):
    with pytest.raises(ModelError) as caught:
        check(QWEN3_30B, **{flag: value})
    assert caught.value.field == "--" + flag.replace("_", "-")
    assert caught.value.value == value
    assert hf_says in caught.value.reason
    assert "Leave" in caught.value.remedy or "leave" in caught.value.remedy


@pytest.mark.parametrize(
    ("flag", "hf"),
    [
        ("swiglu", {"hidden_act": "gelu"}),
        ("disable_bias_linear", {"attention_bias": True}),
        ("untie_embeddings_and_output_weights", {"tie_word_embeddings": True}),
        ("group_query_attention", {"num_key_value_heads": 32}),
        ("qk_layernorm", {"model_type": "qwen2"}),
    ],
)
def test_a_switch_of_another_model_is_refused(flag, hf):
    with pytest.raises(ModelError) as caught:
        check(QWEN3_30B | hf, **{flag: True})
    assert caught.value.field == "--" + flag.replace("_", "-")


def test_a_missing_head_dim_follows_from_the_sizes():
    hf = {name: value for name, value in QWEN3_30B.items() if name != "head_dim"}
    check(hf, kv_channels=2048 // 32)


@pytest.mark.parametrize(
    ("frequency", "expected"),
    [
        (1, [1, 1, 1, 1]),
        ("1", [1, 1, 1, 1]),
        (2, [1, 0, 1, 0]),
        ([0, 1, 1, 1], [0, 1, 1, 1]),
        ("[0, 1, 1, 1]", [0, 1, 1, 1]),
        ("[0]*1+[1]*3", [0, 1, 1, 1]),
        ("([0]*1+[1]*3)", [0, 1, 1, 1]),
        ("[0,1]*2", [0, 1, 0, 1]),
    ],
)
def test_megatrons_notations_of_moe_layers(frequency, expected):
    assert moe_layers(frequency, 4) == expected


def test_an_unreadable_layer_list_is_refused():
    with pytest.raises(ModelError, match="neither a number nor a list"):
        moe_layers("__import__('os')", 4)
