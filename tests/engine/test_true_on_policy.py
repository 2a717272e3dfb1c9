"""True on policy: the log-probs that the engine records are those of the differentiated forward, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from serving import Request, group_requests, make_engine, serve, trained_on
from tiny_models import dense_config, hf_model, moe_config, tiny_dense, tiny_moe, tiny_next, tiny_trainer, twin_of

from lockstep.errors import OptionError, ParityError
from lockstep.exact import compute_exactly
from lockstep.models import LanguageModel
from lockstep.parity import require_same_bits
from lockstep.rollout.embedded.exact import ExactRunner
from lockstep.rollout.engine import Generation
from lockstep.trainer.engine import LogProbs
from lockstep.types import Sample

MODELS = {"dense": tiny_dense, "moe": tiny_moe}
DTYPES = [torch.float32, torch.bfloat16]
BATCHINGS: dict[str, dict[str, Any]] = {
    "packed": {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 128},
    "one by one": {"micro_batch_size": 1},
    "by layer": {"micro_batch_size": 3, "backward_order": "layer"},
    "recomputed": {"micro_batch_size": 7, "recompute_granularity": "full"},
}
PATHS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "temperature": ({"temperature": 0.7}, {}),
    "everything cut": ({"temperature": 0.7, "top_p": 0.8, "top_k": 5}, {}),
    "minimum length, cut": ({"min_new_tokens": 6, "stop_token_ids": tuple(range(60)), "top_p": 0.8}, {}),
    "stop ids": ({"stop_token_ids": tuple(range(20))}, {}),
    "preempted": ({"max_new_tokens": 30}, {"num_blocks": 28}),
    "one at a time": ({}, {"max_running": 1}),
    "chunks": ({"prompt_tokens": 30}, {"max_prefill_tokens": 7}),
    "no sharing": ({}, {"block_size": 64, "num_blocks": 64}),
    "over two blocks of keys": ({"max_new_tokens": 70}, {"num_blocks": 400}),
}


def exact(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    model = model.to(dtype)
    compute_exactly(model)
    return model


def differentiated(
    model: LanguageModel, requests: list[Request], generations: list[Generation], batching: str, temperature: float
) -> torch.Tensor:
    """Log-probs of the forward whose gradient a step follows."""
    samples = [trained_on(r, g) for r, g in zip(requests, generations, strict=True)]
    for number, sample in enumerate(samples):
        sample.advantage, sample.loss_weight = float(number % 3 - 1), 0.1
    trainer = tiny_trainer(model, temperature=temperature, batching=BATCHINGS[batching])
    without_gradient = torch.cat([r.log_probs for r in trainer.log_probs(samples)])
    results = trainer.step(samples).policy
    assert all(r.routes_differ is None or not r.routes_differ.any() for r in results)
    policy = torch.cat([r.log_probs for r in results])
    assert torch.equal(policy, without_gradient)
    return policy


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", MODELS)
def test_sampled_log_probs_are_the_differentiated_ones_bit_for_bit(family: str, path: str) -> None:
    """Every path in fp32 for one family and in bf16 for the other."""
    params, options = PATHS[path]
    model = exact(MODELS[family](), DTYPES[(list(PATHS).index(path) + list(MODELS).index(family)) % 2])
    requests = group_requests(*((1, 2) if "two" in path else (4, 5)), **params)
    engine = make_engine(model, **options)
    assert isinstance(engine.runner, ExactRunner)
    generations = serve(engine, requests)
    if path == "preempted":
        assert engine.scheduler.num_preemptions > 0
    batching = list(BATCHINGS)[list(PATHS).index(path) % len(BATCHINGS)]
    policy = differentiated(model, requests, generations, batching, params.get("temperature", 1.0))
    assert torch.equal(policy, torch.cat([torch.tensor(g.log_probs) for g in generations]))


@pytest.mark.parametrize("seed", range(4))
def test_every_shape_of_model_and_batch_keeps_its_bits(seed: int) -> None:
    """Heads, widths, biases and experts drawn from the seed, wider ones too; the last in two threads."""
    changes: dict[str, Any] = {"hidden_size": 200, "intermediate_size": 136, "head_dim": 40} if seed % 2 else {}
    config = (moe_config if seed % 3 else dense_config)(seed, **changes)
    model = exact(twin_of(hf_model(config)), torch.float32 if seed % 2 else torch.bfloat16)
    requests = [r for size in (1, 2, 8) for r in group_requests(2, size, prompt_tokens=5 + 9 * size)]
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if seed == 3 else threads)
    try:
        generations = serve(make_engine(model), requests)
        policy = differentiated(model, requests, generations, list(BATCHINGS)[seed % 4], 1.0)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(policy, torch.cat([torch.tensor(g.log_probs) for g in generations]))


def test_a_sample_is_the_same_whoever_is_sampled_beside_it() -> None:
    model = exact(tiny_moe(), torch.bfloat16)
    requests = group_requests(4, 5, max_new_tokens=20)
    together = serve(make_engine(model), requests)
    for number in (0, 7, 19):
        alone = serve(make_engine(model), [requests[number]])[0]
        assert alone.token_ids == together[number].token_ids
        assert alone.log_probs == together[number].log_probs


@pytest.mark.parametrize("family", MODELS)
def test_an_exact_model_computes_what_the_model_computes(family: str) -> None:
    """fp32: other orders of the same sums, so log-probs and gradients agree as the orders of packs do."""
    natural, ours = MODELS[family](), exact(MODELS[family](), torch.float32)
    requests = group_requests(3, 4)
    generations = serve(make_engine(ours), requests)
    gradients, policies = [], []
    for model in (natural, ours):
        trainer = tiny_trainer(model, lr=0.0)
        samples = [trained_on(r, g) for r, g in zip(requests, generations, strict=True)]
        for number, sample in enumerate(samples):
            sample.advantage, sample.loss_weight = float(number % 3 - 1), 0.1
        result = trainer.step(samples)
        policies.append(torch.cat([r.log_probs for r in result.policy]))
        gradients.append(result.metrics["train/grad_norm"])
    assert (policies[0] - policies[1]).abs().max() < 1e-4
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-4)


def test_recurrent_models_are_refused_by_name() -> None:
    with pytest.raises(OptionError, match="Qwen3-Next's delta layers"):
        compute_exactly(tiny_next())


def test_one_other_bit_stops_the_run_and_names_its_token() -> None:
    sampled = torch.tensor([-1.0, -2.0, -3.0])
    sample = Sample(
        index=42, tokens=[5, 6, 7, 8], response_length=3, rollout_log_probs=sampled.tolist(), weight_versions=["3"] * 3
    )
    require_same_bits([sample], [LogProbs(sampled, None)], 3)
    other = torch.nextafter(sampled, torch.tensor([-1.0, 0.0, -3.0]))
    require_same_bits([sample], [LogProbs(other, None)], 4)  # of other weights
    with pytest.raises(ParityError, match="log-prob of token 7, response token 1 of sample 42"):
        require_same_bits([sample], [LogProbs(other, None)], 3)
