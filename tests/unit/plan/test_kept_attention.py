"""`--recompute-granularity selective`: what the plan adds for what attention found."""

from __future__ import annotations

from typing import Any

import pytest
from plan_cases import GRPO, SHAPES

from lockstep.config import Config
from lockstep.models import read_model_config
from lockstep.models.activations import Pack, attention_results
from lockstep.plan import Hardware, predict

OF_A_TOKEN = 32 * 128 * 2 + 32 * 4
"""Bytes: of 32 heads of 128 in bf16, and one log sum of each head in fp32."""


def tensors(model: str, recompute_granularity: str, **options: Any) -> int:
    given = GRPO | options | {"hf_checkpoint": "model", "recompute_granularity": recompute_granularity}
    config = Config.from_dict(given)
    found = predict(config, read_model_config(SHAPES[model]), Hardware.parse("8xH200-141G,2T-host"), samples=False)
    return found.phase("backward").tensor_bytes


def test_attention_finds_a_row_of_heads_and_their_log_sums() -> None:
    config = read_model_config(SHAPES["4B"])
    assert attention_results(config, 0, Pack(16384, 4096, 2, "fused")) == 16384 * OF_A_TOKEN
    assert attention_results(config, 0, Pack(16384, 4096, 2, "plain")) == 0, "torch's kernel is called again"
    hybrid = read_model_config(SHAPES["Next-80B-A3B"])
    kept = [attention_results(hybrid, layer, Pack(100, 100, 2, "fused")) for layer in range(4)]
    assert kept == [0, 0, 0, 100 * (16 * 256 * 2 + 16 * 4)], "three layers of four have the delta rule"


def test_it_is_kept_for_all_layers_of_a_micro_batch() -> None:
    """36 layers, at the moment when the last of them has its activations anyway."""
    options = {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 16384}
    more = tensors("4B", "selective", **options) - tensors("4B", "full", **options)
    assert more == pytest.approx(36 * 16384 * OF_A_TOKEN, rel=0.03)


def test_by_layer_it_is_kept_for_the_whole_step() -> None:
    options = {"backward_order": "layer", "global_batch_size": 64, "rollout_max_response_len": 2048}
    more = tensors("4B", "selective", **options) - tensors("4B", "full", **options)
    config = Config.from_dict(GRPO | options | {"hf_checkpoint": "model"})
    step = 64 * (2048 + (config.rollout.rollout_max_prompt_len or 0))
    assert more == pytest.approx(36 * step * OF_A_TOKEN, rel=0.03)


def test_context_parallel_ranks_keep_nothing() -> None:
    options = {"actor_num_gpus_per_node": 2, "context_parallel_size": 2}
    assert tensors("4B", "selective", **options) == tensors("4B", "full", **options)
