"""True on policy on a Hopper GPU: kernels that keep a row's bits, and 100,000 sampled tokens without a difference."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, dense_config, hf_model, moe_config, tiny_trainer, twin_of
from torch import Tensor

from lockstep.config import BatchingOptions
from lockstep.exact import compute_exactly
from lockstep.kernels.attention import SegmentAttention
from lockstep.kernels.fixed_attention import fixed_paged_decode
from lockstep.kernels.fixed_product import fixed_grouped_product, fixed_product
from lockstep.kernels.linear_log_probs import linear_log_probs
from lockstep.models import LanguageModel
from lockstep.rollout.embedded import EmbeddedEngine
from lockstep.rollout.embedded.exact import ExactRunner
from lockstep.rollout.engine import Generation, SamplingParams
from lockstep.trainer.batch import TrainSample

COMMON = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_hidden_layers": 3,
    "max_position_embeddings": 4096,
}
EXPERTS = {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 192, "mlp_only_layers": []}
CONFIGS = {
    "dense": dense_config(0, **COMMON, intermediate_size=1024),
    "moe": moe_config(3, **COMMON, **EXPERTS, decoder_sparse_step=1),
}
PARAMS = [
    SamplingParams(max_new_tokens=700),
    SamplingParams(max_new_tokens=300),
    SamplingParams(max_new_tokens=150, top_p=0.8),
    SamplingParams(max_new_tokens=500, stop_token_ids=(3, 17)),
    SamplingParams(max_new_tokens=90, min_new_tokens=40, stop_token_ids=tuple(range(40)), top_k=20),
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", torch.bfloat16)


def model_of(family: str) -> LanguageModel:
    return twin_of(hf_model(CONFIGS[family])).to("cuda", torch.bfloat16)


@pytest.mark.parametrize(("width", "out"), [(2048, 768), (768, 2048), (2048, 5000), (200, 72)])
def test_a_row_of_a_product_has_the_same_bits_among_any_number_of_rows(width: int, out: int) -> None:
    """Against fp64 within twice what torch's own product misses."""
    x, weight = draw(16384, width), draw(out, width, seed=1)
    whole = fixed_product(x, weight)
    wanted = x[:2048].double() @ weight.double().T
    error, theirs = ((y[:2048].double() - wanted).abs().max() for y in (whole, x @ weight.T))
    assert error <= 2 * theirs
    for start, count in ((0, 1), (16383, 1), (63, 2), (100, 7), (31, 64), (1000, 129), (5, 4097)):
        assert torch.equal(fixed_product(x[start : start + count], weight), whole[start : start + count])


def test_grouped_products_have_the_bits_of_single_ones_and_torchs_gradients() -> None:
    counts = [0, 1, 64, 65, 0, 700, 3, 0]
    x, weight = draw(sum(counts), 256).requires_grad_(), draw(len(counts), 384, 256, seed=1).requires_grad_()
    ends = torch.tensor(counts, device="cuda").cumsum(0).int()
    got = fixed_grouped_product(x, weight, ends)
    assert torch.equal(got, torch.cat([fixed_product(a, w) for a, w in zip(x.split(counts), weight, strict=True)]))
    upstream = draw(*got.shape, seed=2)
    natural = torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    ours, theirs = (torch.autograd.grad(y, (x, weight), upstream) for y in (got, natural))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-2 * b.abs().max()  # rounded to bf16 at 2^-8


@pytest.mark.parametrize(("head_dim", "heads", "keys"), [(64, 8, 4), (128, 32, 4), (128, 32, 8), (256, 16, 2)])
def test_decoding_over_a_paged_cache_has_the_bits_of_the_trainers_attention(
    head_dim: int, heads: int, keys: int
) -> None:
    length, block_size = 1500, 16
    q = draw(length, heads, head_dim)
    k, v = draw(length, keys, head_dim, seed=1), draw(length, keys, head_dim, seed=2)
    whole = SegmentAttention([length], [length], q.device)(q, k, v)
    cache = torch.full((2, keys, 120, block_size, head_dim), float("nan"), device="cuda", dtype=torch.bfloat16)
    blocks = torch.randperm(120)[: -(-length // block_size)]
    slots = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()[:length].cuda()
    cache.flatten(2, 3)[0, :, slots], cache.flatten(2, 3)[1, :, slots] = k.transpose(0, 1), v.transpose(0, 1)
    seen = torch.tensor([1, 2, 63, 64, 65, 127, 128, 129, 1000, 1499, 1500, 0], device="cuda")
    tables = blocks.int().cuda()[None].repeat(len(seen), 1)
    got = fixed_paged_decode(q[(seen - 1).clamp(min=0)], cache, tables, seen.int())
    assert torch.equal(got[:-1], whole[seen[:-1] - 1])
    assert got[-1].eq(0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_of_logits_are_the_trainers(temperature: float) -> None:
    from lockstep.kernels.linear_log_probs_triton import log_probs_of_logits

    hidden, weight = draw(300, 256), draw(9001, 256, seed=1)
    targets = torch.arange(300, device="cuda")
    for with_entropy in (True, False):
        trained, _ = linear_log_probs(
            hidden, weight, targets, temperature=temperature, product=fixed_product, with_entropy=with_entropy
        )
        logits = fixed_product(hidden[100:107], weight)
        temperatures = torch.full((7,), temperature, device="cuda")
        assert torch.equal(log_probs_of_logits(logits, targets[100:107], temperatures), trained[100:107])


def sampled(
    model: LanguageModel, requests: list[tuple[list[int], SamplingParams, tuple[int, ...]]], **sizes: int
) -> tuple[list[Generation], EmbeddedEngine]:
    options: dict[str, Any] = {"num_blocks": 4096, "block_size": 16, "max_running": 128, "max_prefill_tokens": 4096}
    engine = EmbeddedEngine(model, **(options | sizes), decode_text=lambda ids: "", seed=3)

    async def all_of_them() -> list[Generation]:
        answers = list(await asyncio.gather(*(engine.generate(*request) for request in requests)))
        await engine.drain()
        return answers

    return asyncio.run(all_of_them()), engine


def ragged_requests(count: int, seed: int) -> list[tuple[list[int], SamplingParams, tuple[int, ...]]]:
    """Groups of one to eight samples of prompts of 1 to 900 tokens, ending at different times."""
    pick = random.Random(seed)
    requests: list[tuple[list[int], SamplingParams, tuple[int, ...]]] = []
    group = 0
    while len(requests) < count:
        prompt = [pick.randrange(VOCAB) for _ in range(pick.choice([1, 16, 17, 200, 900]))]
        for index in range(pick.choice([1, 2, 8])):
            requests.append((prompt, pick.choice(PARAMS), (0, seed, group, index)))
        group += 1
    return requests


@pytest.mark.parametrize("family", CONFIGS)
def test_a_hundred_thousand_tokens_at_changing_batch_composition_differ_by_exactly_nothing(family: str) -> None:
    """Prefix sharing, chunks, preemption, graphs of many sizes; against the forward that is differentiated. The cost
    is printed: the time of the same requests, naturally and exactly, graphs and compilation left out."""
    model = model_of(family)
    seconds, tokens = {}, 0
    rounds = [
        (ragged_requests(200, 1), {}),
        (ragged_requests(200, 2), {"max_prefill_tokens": 300}),
        (ragged_requests(200, 3), {"num_blocks": 900}),
    ]
    compute_exactly(model)
    trainer = tiny_trainer(model, lr=0.0)
    for requests, sizes in rounds:
        generations, engine = sampled(model, requests, **sizes)
        assert isinstance(engine.runner, ExactRunner)
        assert engine.scheduler.num_preemptions > 0 or "num_blocks" not in sizes
        samples = [
            TrainSample(
                tokens=prompt + generation.token_ids,
                response_length=len(generation.token_ids),
                loss_mask=[1] * len(generation.token_ids),
                loss_weight=1e-4,
                advantage=1.0,
                rollout_log_probs=generation.log_probs,
                kept_token_ids=generation.kept_token_ids,
                kept_token_offsets=generation.kept_token_offsets,
                routed_experts=generation.routed_experts,
            )
            for (prompt, _, _), generation in zip(requests, generations, strict=True)
        ]
        for most in (2048, 16384):
            trainer.batching = BatchingOptions(use_dynamic_batch_size=True, max_tokens_per_gpu=most)
            policy = trainer.step(samples).policy
            trained = torch.cat([result.log_probs for result in policy])
            difference = trained - torch.tensor([x for g in generations for x in g.log_probs])
            assert int((difference != 0).sum()) == 0
        tokens += len(difference)
    assert tokens > 100_000
    for name, timed in (("exactly", model), ("naturally", model_of(family))):
        engine = EmbeddedEngine(
            timed, num_blocks=4096, block_size=16, max_running=128, max_prefill_tokens=4096,
            decode_text=lambda ids: "", seed=3,
        )  # fmt: skip

        async def work(engine: EmbeddedEngine = engine) -> None:
            await asyncio.gather(*(engine.generate(*request) for request in rounds[0][0]))
            await engine.drain()

        asyncio.run(work())
        began = time.perf_counter()
        asyncio.run(work())
        seconds[name] = time.perf_counter() - began
    print(f"{family}: {tokens} tokens; {seconds}, {seconds['exactly'] / seconds['naturally']:.2f} times the time")
