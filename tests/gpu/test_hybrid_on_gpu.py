"""Qwen3-Next with the real head sizes on a GPU: the sampler's caches against the trainer's forward pass."""

from __future__ import annotations

import asyncio

import pytest
import torch
from tiny_models import VOCAB, hf_model, next_config, random_documents, tiny_trainer, twin_of

from lockstep.models import LanguageModel
from lockstep.rollout.embedded import EmbeddedEngine
from lockstep.rollout.engine import Generation, SamplingParams
from lockstep.trainer.batch import TrainSample

PROMPTS = random_documents([5, 70, 300, 129])
GEOMETRY = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
}


def sampled(model: LanguageModel) -> list[Generation]:
    engine = EmbeddedEngine(
        model,
        num_blocks=512,
        block_size=16,
        max_running=6,
        max_prefill_tokens=512,
        decode_text=lambda ids: "",
        seed=3,
    )
    params = SamplingParams(max_new_tokens=40)

    async def all_of_them() -> list[Generation]:
        calls = [engine.generate(PROMPTS[i % 4], params, (0, i, 0)) for i in range(12)]
        return list(await asyncio.gather(*calls))

    try:
        return asyncio.run(all_of_them())
    finally:
        engine.close()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_the_samplers_log_probs_are_the_trainers_through_convolution_state_and_experts(
    dtype: torch.dtype, limit: float
) -> None:
    """Mean difference under routing replay. bf16 rounds at 2^-8, and prefill, decode and training use three kernels."""
    model = twin_of(hf_model(next_config(0, **GEOMETRY))).to("cuda", dtype)
    generations = sampled(model)
    samples = [
        TrainSample(
            tokens=PROMPTS[i % 4] + g.token_ids,
            response_length=len(g.token_ids),
            loss_mask=[1] * len(g.token_ids),
            routed_experts=g.routed_experts,
        )
        for i, g in enumerate(generations)
    ]
    assert all(0 <= token < VOCAB for sample in samples for token in sample.tokens)
    results = tiny_trainer(model, routing="rollout").log_probs(samples)
    difference = torch.cat([r.log_probs.cpu() for r in results]) - torch.tensor(
        [x for g in generations for x in g.log_probs]
    )
    print(f"{dtype}: mean |difference| {difference.abs().mean():.2e}, largest {difference.abs().max():.2e}")
    assert difference.abs().mean() < limit
