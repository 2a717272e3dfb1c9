"""Models and options that plans are made of."""

from __future__ import annotations

from typing import Any

from lockstep.config import Config

_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
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
    "Next-80B-A3B": {
        "model_type": "qwen3_next",
        "vocab_size": 151936,
        "num_hidden_layers": 48,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
        "partial_rotary_factor": 0.25,
        "rope_theta": 1e7,
        "max_position_embeddings": 262144,
    },
    "4B": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "num_hidden_layers": 36,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
        "max_position_embeddings": 40960,
    },
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
