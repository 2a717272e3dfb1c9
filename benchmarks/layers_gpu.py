"""Where a training step's time goes on one GPU: four layers of each real geometry, forward and backward with recompute.

    python benchmarks/layers_gpu.py OUTPUT_FOLDER [GEOMETRY ...]

Prints, for each geometry, milliseconds and model TFLOP/s per layer and for the projection to the vocabulary, and writes
the time of every kernel and its share beside them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from lockstep.kernels.linear_log_probs import linear_log_probs
from lockstep.kernels.packed import PackedDocuments
from lockstep.models import LanguageModel, ModelConfig, Qwen3NextConfig, build_model, read_model_config

DOCUMENT, TOKENS, LAYERS = 4096, 16384, 4
GEOMETRIES: dict[str, dict[str, Any]] = {
    "4b": {
        "model_type": "qwen3", "hidden_size": 2560, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 9728,
    },
    "30b-a3b": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "intermediate_size": 6144, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "norm_topk_prob": True,
    },
    "next-80b-a3b": {
        "model_type": "qwen3_next", "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 2,
        "head_dim": 256, "intermediate_size": 5120, "num_experts": 512, "num_experts_per_tok": 10,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    },
}  # fmt: skip
VOCABULARY = 151936


def main(folder: Path, names: list[str]) -> None:
    for name in names:
        config = read_model_config(GEOMETRIES[name] | {"vocab_size": 1024, "num_hidden_layers": LAYERS})
        result, kernels = measure(random_model(config))
        (folder / f"layers-{name}.json").write_text(json.dumps(result, indent=2) + "\n")
        (folder / f"layers-{name}.txt").write_text(kernels)
        print(name, json.dumps({key: value for key, value in result.items() if key != "shares"}), flush=True)
        torch.cuda.empty_cache()


def random_model(config: ModelConfig) -> LanguageModel:
    """bf16 weights on the GPU; only their shapes matter here."""
    with torch.device("meta"):
        model = build_model(config)
    model = model.to(torch.bfloat16).to_empty(device="cuda")
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    return model


def measure(model: LanguageModel) -> tuple[dict[str, Any], str]:
    config = model.config
    documents = PackedDocuments([DOCUMENT] * (TOKENS // DOCUMENT), torch.device("cuda"))
    ids = torch.randint(0, config.vocab_size, (TOKENS,), device="cuda")
    positions = torch.arange(DOCUMENT, device="cuda").repeat(TOKENS // DOCUMENT)

    def step() -> None:
        hidden = model(
            ids, positions, documents, run_layer=lambda *arguments: checkpoint(*arguments, use_reentrant=False)
        )
        hidden.backward(torch.ones_like(hidden))

    weight = torch.randn(VOCABULARY, config.hidden_size, device="cuda", dtype=torch.bfloat16).requires_grad_()
    hidden = torch.randn(TOKENS, config.hidden_size, device="cuda", dtype=torch.bfloat16).requires_grad_()

    def project() -> None:
        linear_log_probs(hidden, weight, ids, with_entropy=False)[0].sum().backward()

    layer_ms, vocabulary_ms = milliseconds(step) / LAYERS, milliseconds(project)
    flops = layer_flops_per_token(config) * TOKENS
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    averages = profiled.key_averages()
    kernels = averages.table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=70)
    on_gpu = [event for event in averages if event.device_type == DeviceType.CUDA]
    total = sum(event.self_device_time_total for event in on_gpu)
    return {
        "layer_ms": layer_ms,
        "layer_model_tflops": flops / layer_ms / 1e9,
        "vocabulary_ms": vocabulary_ms,
        "vocabulary_tflops": 6 * VOCABULARY * config.hidden_size * TOKENS / vocabulary_ms / 1e9,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "shares": {event.key: event.self_device_time_total / total for event in on_gpu},
    }, kernels


def layer_flops_per_token(c: ModelConfig) -> float:
    """Multiplications and additions of forward and backward, per token and layer, recomputing not counted."""
    attention = c.hidden_size * c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
    scores = DOCUMENT * c.num_attention_heads * c.head_dim
    mixing = float(attention + scores)
    if isinstance(c, Qwen3NextConfig):
        attention += c.hidden_size * c.head_dim * c.num_attention_heads
        values = c.linear_num_value_heads * c.linear_value_head_dim
        delta = c.hidden_size * (c.conv_channels + 2 * values) + 3 * values * c.linear_key_head_dim
        mixing = (c.num_attention_layers * (attention + scores) + c.num_delta_layers * delta) / c.num_hidden_layers
    width = c.num_experts_per_tok * c.moe_intermediate_size or c.intermediate_size
    width += getattr(c, "shared_expert_intermediate_size", 0)
    return 6 * (mixing + 3 * c.hidden_size * width + c.hidden_size * c.num_experts)


def milliseconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """Median by device events, after two runs to warm up."""
    times = []
    for i in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(GEOMETRIES))
