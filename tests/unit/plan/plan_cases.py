"""Models and options that plans are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lockstep.config import Config

_MODELS = Path(__file__).parents[3] / "recipes" / "models"


def _published(name: str) -> dict[str, Any]:
    shape: dict[str, Any] = json.loads((_MODELS / name / "config.json").read_text())
    return shape


_MOE = _published("Qwen3-30B-A3B")
SHAPES: dict[str, dict[str, Any]] = {
    "30B-A3B": _MOE,
    "235B-A22B": _MOE
    | {
        "num_hidden_layers": 94,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 64,
        "moe_intermediate_size": 1536,
    },
    "Next-80B-A3B": _published("Qwen3-Next-80B-A3B-Thinking"),
    "4B": _published("Qwen3-4B"),
}
"""As published."""

ONE_H200, EIGHT_H100 = "1xH200-141G,128G-host", "8xH100-80G,2T-host"

GRPO: dict[str, Any] = {
    "hf_checkpoint": "model",
    "prompt_data": "prompts.jsonl",
    "rm_type": "math",
    "num_rollout": 10,
    "rollout_batch_size": 32,
    "n_samples_per_prompt": 8,
    "rollout_max_prompt_len": 1024,
    "rollout_max_response_len": 7168,
    "use_dynamic_batch_size": True,
    "max_tokens_per_gpu": 16384,
}
ONE_GPU: dict[str, Any] = GRPO | {
    "rollout_batch_size": 4,
    "rollout_max_prompt_len": 256,
    "rollout_max_response_len": 3840,
    "backward_order": "layer",
    "use_precision_aware_optimizer": True,
    "main_grads_dtype": "bf16",
    "exp_avg_dtype": "8bit",
    "exp_avg_sq_dtype": "8bit",
    "optimizer_cpu_offload": True,
    "optimizer_offload_fraction": 0.9,
    "overlap_cpu_optimizer_d2h_h2d": True,
}
"""What `benchmarks/one_gpu_30b.py` trains with: 131,072 tokens a step in documents of 4,096."""


def config(options: dict[str, Any], **changes: Any) -> Config:
    return Config.from_dict(options | changes)
