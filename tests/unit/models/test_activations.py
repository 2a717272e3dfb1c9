"""What `block_memory` says of the CPU's kernels is what their tensors take, within 10 %."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from torch import Tensor

from lockstep.kernels.linear_log_probs import linear_log_probs
from lockstep.kernels.packed import PackedDocuments
from lockstep.models import LanguageModel, build_model, read_model_config
from lockstep.models.activations import Pack, block_memory, logits_memory
from lockstep.models.layers.moe import top_k_experts

WITHIN = 0.1
"""Of the goal for whole plans; the formulas leave out what is per row and small, such as a norm's root mean square."""

TOKENS, DOCUMENT = 1024, 256
COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 384,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True}
DELTA = {
    "shared_expert_intermediate_size": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "full_attention_interval": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "dense": COMMON | {"model_type": "qwen3"},
    "many heads": COMMON | {"model_type": "qwen3", "num_attention_heads": 16, "num_key_value_heads": 2},
    "moe": COMMON | EXPERTS | {"model_type": "qwen3_moe"},
    "many slots": COMMON | EXPERTS | {"model_type": "qwen3_moe", "num_experts": 16, "num_experts_per_tok": 8},
    "next": COMMON | EXPERTS | DELTA | {"model_type": "qwen3_next"},
}
CASES = [(shape, layer) for shape in SHAPES for layer in ((0, 1) if shape == "next" else (0,))]


def make(shape: str, dtype: torch.dtype) -> tuple[LanguageModel, PackedDocuments, tuple[Tensor, Tensor], Tensor]:
    """The model, its documents with their index tables made, rotary tables and a block's input."""
    torch.manual_seed(0)
    model = build_model(read_model_config(SHAPES[shape])).to(dtype)
    documents = PackedDocuments([DOCUMENT] * (TOKENS // DOCUMENT), torch.device("cpu"))
    assert documents.attention is not None
    assert documents.delta_layout is not None
    positions = torch.arange(DOCUMENT).repeat(TOKENS // DOCUMENT)
    return model, documents, model.rotary(positions), torch.randn(TOKENS, model.config.hidden_size, dtype=dtype)


def near(measured: int) -> Any:
    return pytest.approx(measured, rel=WITHIN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("shape", "layer"), CASES)
def test_a_block_keeps_and_takes_what_is_predicted(shape: str, layer: int, dtype: torch.dtype) -> None:
    model, documents, rotary, x_TD = make(shape, dtype)
    block = model.model.layers[str(layer)]
    predicted = block_memory(model.config, layer, Pack(TOKENS, DOCUMENT, dtype.itemsize, "cpu"))
    x_TD.requires_grad_()
    with LiveBytes(x_TD, *block.parameters()) as live:
        out_TD = block(x_TD, rotary, documents, top_k_experts)
        assert predicted.kept_bytes == near(live.now - out_TD.nbytes)
        upstream = torch.ones_like(out_TD)
        live.peak = live.now
        out_TD.backward(upstream)
    assert predicted.kept_bytes + predicted.backward == near(live.peak - out_TD.nbytes - upstream.nbytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("shape", "layer"), CASES)
def test_a_forward_pass_without_gradient_takes_what_is_predicted(shape: str, layer: int, dtype: torch.dtype) -> None:
    model, documents, rotary, x_TD = make(shape, dtype)
    block = model.model.layers[str(layer)]
    predicted = block_memory(model.config, layer, Pack(TOKENS, DOCUMENT, dtype.itemsize, "cpu"))
    with torch.no_grad(), LiveBytes(x_TD, *block.parameters()) as live:
        out_TD = block(x_TD, rotary, documents, top_k_experts)
    assert predicted.forward == near(live.peak - out_TD.nbytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("chunk_rows", [256, TOKENS])
def test_log_probs_take_what_is_predicted(chunk_rows: int, dtype: torch.dtype) -> None:
    model, _, _, hidden_TD = make("dense", dtype)
    weight_VD, targets = model.lm_head.weight, torch.zeros(TOKENS, dtype=torch.int64)
    predicted = logits_memory(model.config, TOKENS, chunk_rows, Pack(TOKENS, DOCUMENT, dtype.itemsize, "cpu"))
    with torch.no_grad(), LiveBytes(hidden_TD, weight_VD, targets) as live:
        linear_log_probs(hidden_TD, weight_VD, targets, chunk_rows=chunk_rows, with_entropy=False)
    assert predicted[0] == near(live.peak)
    hidden_TD.requires_grad_()
    with LiveBytes(hidden_TD, weight_VD, targets) as live:
        linear_log_probs(hidden_TD, weight_VD, targets, chunk_rows=chunk_rows, with_entropy=False)[0].sum().backward()
    assert predicted[1] == near(live.peak - hidden_TD.nbytes)


def test_fused_kernels_keep_less_than_plain_ones() -> None:
    config = read_model_config(SHAPES["moe"])
    packs = [Pack(TOKENS, DOCUMENT, 2, kernels) for kernels in ("fused", "plain", "cpu")]
    kept = [block_memory(config, 0, pack).kept_bytes for pack in packs]
    assert kept == sorted(kept)
    assert kept[0] < kept[1]


def test_memory_grows_with_tokens() -> None:
    """Fresh gradients of weights are all that does not."""
    config = read_model_config(SHAPES["moe"])
    one, four = (block_memory(config, 0, Pack(tokens, DOCUMENT, 2, "fused")) for tokens in (TOKENS, 4 * TOKENS))
    assert four.kept_bytes == 4 * one.kept_bytes
    assert four.forward == 4 * one.forward
    assert one.backward < four.backward < 4 * one.backward
