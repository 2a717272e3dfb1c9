"""Where the GPU path stands before it is made fast: training and decode of a model's geometry with random weights.

    python benchmarks/gpu_start.py OUTPUT.json

Training is forward + backward of packed 4k documents with full recompute and without an optimizer; decode is the
embedded engine with its torch kernels, prefill excluded. Ceilings are measured in the same run.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from lockstep.kernels.linear_log_probs import linear_log_probs
from lockstep.kernels.packed import PackedDocuments
from lockstep.models import Qwen3, Qwen3Config
from lockstep.rollout.embedded import EmbeddedEngine
from lockstep.rollout.engine import SamplingParams

DOCUMENT, TOKENS = 4096, 16384
GEOMETRIES: dict[str, dict[str, Any]] = {
    "Qwen3-4B": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2560, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 9728,
        "tie_word_embeddings": True,
    },
    "Qwen3-30B-A3B, 24 of 48 layers": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 24,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144,
        "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
    },
}  # fmt: skip


def main() -> None:
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "ceilings": ceilings(),
    }
    for name, shape in GEOMETRIES.items():
        model = random_model(Qwen3Config.from_hf(shape))
        result[name] = {"decode": decode(model), "training": training(model)}
        print(name, json.dumps(result[name]), flush=True)
        del model
        torch.cuda.empty_cache()
    Path(sys.argv[1]).write_text(json.dumps(result, indent=2) + "\n")


def random_model(config: Qwen3Config) -> Qwen3:
    with torch.device("meta"):
        model = Qwen3(config)
    model = model.to(torch.bfloat16).to_empty(device="cuda")
    model.tie_weights()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
    return model


def ceilings() -> dict[str, float]:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return {
        "matmul_tflops": 2 * 8192**3 / seconds(lambda: a @ b) / 1e12,
        "copy_tbytes_per_s": 2 * 2**32 / seconds(lambda: target.copy_(source)) / 1e12,
    }


def training(model: Qwen3) -> dict[str, float]:
    config = model.config
    documents = [DOCUMENT] * (TOKENS // DOCUMENT)
    ids = torch.randint(0, config.vocab_size, (TOKENS,), device="cuda")
    positions = torch.arange(DOCUMENT, device="cuda").repeat(len(documents))

    def step() -> None:
        hidden = model(
            ids,
            positions,
            PackedDocuments(documents, ids.device),
            run_layer=lambda *arguments: checkpoint(*arguments, use_reentrant=False),
        )
        linear_log_probs(hidden, model.lm_head.weight, ids, with_entropy=False)[0].sum().backward()
        model.zero_grad(set_to_none=True)

    torch.cuda.reset_peak_memory_stats()
    time_s = seconds(step, repeats=3)
    inner = config.num_attention_heads * config.head_dim
    flops_per_token = 6 * active_matmul_parameters(config) + 6 * DOCUMENT * inner * config.num_hidden_layers
    return {
        "tokens_per_s": TOKENS / time_s,
        "model_tflops": flops_per_token * TOKENS / time_s / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def active_matmul_parameters(c: Qwen3Config) -> int:
    attention = c.hidden_size * c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
    feed_forward = 3 * c.hidden_size * (c.num_experts_per_tok * c.moe_intermediate_size or c.intermediate_size)
    router = c.hidden_size * c.num_experts
    return c.num_hidden_layers * (attention + feed_forward + router) + c.vocab_size * c.hidden_size


def decode(model: Qwen3, batch: int = 128, prompt: int = 128, steps: int = 32) -> dict[str, float]:
    engine = EmbeddedEngine(
        model,
        num_blocks=batch * 24,
        block_size=16,
        max_running=batch,
        max_prefill_tokens=batch * prompt,
        decode_text=lambda _: "",
        seed=0,
    )
    for i in range(batch):
        tokens = torch.randint(0, 1000, (prompt,)).tolist()
        engine.add(engine.sequence(tokens, SamplingParams(max_new_tokens=200), (0, i)))
    for _ in range(8):
        engine.step()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        engine.step()
    torch.cuda.synchronize()
    time_s = (time.perf_counter() - started) / steps
    engine.close()
    return {"batch": batch, "context": prompt, "ms_per_step": time_s * 1e3, "tokens_per_s": batch / time_s}


def seconds(run: Callable[[], Any], repeats: int = 10) -> float:
    """Median of some timed runs after two to warm up."""
    times = []
    for i in range(repeats + 2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


if __name__ == "__main__":
    main()
