from __future__ import annotations

from typing import Any

import pytest
from transformers import Qwen3Config as HFDense
from transformers import Qwen3MoeConfig as HFSparse

from lockstep.errors import ModelError
from lockstep.models import Qwen3Config
from lockstep.models.qwen3 import _CHECKED, _IRRELEVANT

DENSE = HFDense().to_dict()
SPARSE = HFSparse().to_dict()
USED = {
    "vocab_size": (500, "vocab_size", 500),
    "hidden_size": (256, "hidden_size", 256),
    "intermediate_size": (80, "intermediate_size", 80),
    "num_hidden_layers": (3, "num_hidden_layers", 3),
    "num_attention_heads": (64, "num_attention_heads", 64),
    "num_key_value_heads": (2, "num_key_value_heads", 2),
    "head_dim": (24, "head_dim", 24),
    "max_position_embeddings": (77, "max_position_embeddings", 77),
    "rms_norm_eps": (1e-5, "rms_norm_eps", 1e-5),
    "tie_word_embeddings": (True, "tie_word_embeddings", True),
    "attention_bias": (True, "attention_bias", True),
    "rope_theta": (5e5, "rope_theta", 5e5),
    "rope_parameters": ({"rope_type": "default", "rope_theta": 7e5}, "rope_theta", 7e5),
}
USED_IF_SPARSE = {
    "num_experts": (12, "num_experts", 12),
    "num_local_experts": (12, "num_experts", 12),
    "num_experts_per_tok": (3, "num_experts_per_tok", 3),
    "moe_intermediate_size": (88, "moe_intermediate_size", 88),
    "norm_topk_prob": (True, "norm_topk_prob", True),
    "decoder_sparse_step": (2, "decoder_sparse_step", 2),
    "mlp_only_layers": ([0, 2], "mlp_only_layers", (0, 2)),
}
REFUSED: list[tuple[str, Any]] = [
    ("hidden_act", "gelu"),
    ("use_sliding_window", True),
    ("attention_dropout", 0.1),
    ("layer_types", ["full_attention", "sliding_attention"]),
    ("rope_parameters", {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}),
    ("rope_scaling", {"type": "linear", "factor": 2.0}),
    ("rope_scaling", {"mrope_section": [16, 24, 24]}),
    ("model_type", "llama"),
    ("model_type", None),
    ("quantization_config", {"quant_method": "fp8"}),
    ("shared_expert_intermediate_size", 64),
    ("num_key_value_heads", 5),
    ("head_dim", 7),
]
"""One value of every field that would change the result and is not computed."""


@pytest.mark.parametrize("name", sorted({*DENSE, *SPARSE}))
def test_every_field_that_transformers_writes_is_used_or_refused_or_irrelevant_with_a_reason(name: str) -> None:
    used = name in USED or name in USED_IF_SPARSE or name == "model_type"
    refused = name in {field for field, _ in REFUSED} - {*USED, "model_type"}
    irrelevant = name in _IRRELEVANT
    assert used + refused + irrelevant == 1
    assert name not in _CHECKED or name in {field for field, _ in REFUSED}
    assert not irrelevant or len(_IRRELEVANT[name]) > 10


@pytest.mark.parametrize("name", sorted(USED))
@pytest.mark.parametrize("hf", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_a_used_field_reaches_the_model(hf: dict[str, Any], name: str) -> None:
    value, ours, wanted = USED[name]
    without_rope = {k: v for k, v in hf.items() if k != "rope_parameters" or name != "rope_theta"}
    assert getattr(Qwen3Config.from_hf(without_rope | {name: value}), ours) == wanted


@pytest.mark.parametrize("name", sorted(USED_IF_SPARSE))
def test_a_field_of_experts_reaches_a_sparse_model_and_is_refused_in_a_dense_one(name: str) -> None:
    value, ours, wanted = USED_IF_SPARSE[name]
    others = {k: v for k, v in SPARSE.items() if k != "num_local_experts"} if name == "num_experts" else SPARSE
    assert getattr(Qwen3Config.from_hf(others | {name: value}), ours) == wanted
    with pytest.raises(ModelError, match=r"config.json (num_|moe_|norm_topk|decoder_sparse|mlp_only)"):
        Qwen3Config.from_hf(DENSE | {name: value})


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_a_value_that_is_not_computed_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ModelError) as raised:
        Qwen3Config.from_hf(DENSE | {name: value})
    assert name in raised.value.field or name.startswith("rope")
    assert raised.value.remedy


def test_more_experts_per_token_than_experts_are_refused() -> None:
    with pytest.raises(ModelError, match="only 4 experts"):
        Qwen3Config.from_hf(SPARSE | {"num_local_experts": 4})


@pytest.mark.parametrize("name", sorted(SPARSE))
def test_a_field_left_out_means_what_transformers_takes_it_for_or_is_refused(name: str) -> None:
    """config.json may omit what equals HF's default."""
    shorter = {k: v for k, v in SPARSE.items() if k != name}
    try:
        ours = Qwen3Config.from_hf(shorter)
    except ModelError as error:
        assert "missing" in error.reason or name == "model_type"  # noqa: PT017
        return
    theirs = HFSparse(**{k: v for k, v in shorter.items() if k not in ("model_type", "transformers_version")})
    wanted = Qwen3Config.from_hf(theirs.to_dict())
    assert ours == wanted or (name == "intermediate_size" and wanted.num_sparse_layers == wanted.num_hidden_layers)


def test_experts_sit_where_transformers_puts_them() -> None:
    config = Qwen3Config.from_hf(SPARSE | {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert [config.is_sparse(layer) for layer in range(6)] == [False, True, False, False, False, True]
    assert config.num_sparse_layers == 2
