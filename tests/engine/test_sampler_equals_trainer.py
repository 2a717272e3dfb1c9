"""The log-probs that the engine records are the trainer's on the same tokens, whatever path sampled them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from serving import Request, group_requests, make_engine, serve, trained_on
from tiny_models import (
    CONFIGS,
    hf_model,
    packed_logits,
    tiny_dense,
    tiny_moe,
    tiny_next,
    tiny_trainer,
    twin_of,
)

from lockstep.models import LanguageModel
from lockstep.rollout.engine import Generation

MODELS = {"dense": tiny_dense, "moe": tiny_moe, "next": tiny_next}


def differences(
    model: LanguageModel, requests: list[Request], generations: list[Generation], temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """|trainer - sampler| of every sampled token under the sampler's routes, and whether the trainer's own differ."""
    samples = [trained_on(r, g) for r, g in zip(requests, generations, strict=True)]
    replayed = tiny_trainer(model, temperature=temperature, routing="rollout").log_probs(samples)
    own = tiny_trainer(model, temperature=temperature, routing="own").log_probs(samples)
    sampled = torch.cat([torch.tensor(g.log_probs) for g in generations])
    flips = [torch.zeros(len(o.log_probs)) if o.routes_differ is None else o.routes_differ for o in own]
    return (torch.cat([r.log_probs for r in replayed]) - sampled).abs(), torch.cat(flips)


PATHS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "temperature": ({"temperature": 0.7}, {}),
    "nucleus": ({"top_p": 0.8}, {}),
    "few": ({"top_k": 5}, {}),
    "everything cut": ({"temperature": 0.7, "top_p": 0.8, "top_k": 5}, {}),
    "minimum length": ({"min_new_tokens": 6, "stop_token_ids": tuple(range(60))}, {}),
    "minimum length, cut": ({"min_new_tokens": 6, "stop_token_ids": tuple(range(60)), "top_p": 0.8}, {}),
    "stop ids": ({"stop_token_ids": tuple(range(20))}, {}),
    "stop strings": ({"stop": ("b", "xy")}, {}),
    "no sharing": ({}, {"block_size": 64, "num_blocks": 64}),
    "preempted": ({"max_new_tokens": 30}, {"num_blocks": 28}),
    "one at a time": ({}, {"max_running": 1}),
    "small prefills": ({}, {"max_prefill_tokens": 12}),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", MODELS)
def test_sampled_log_probs_are_the_trainers(family: str, path: str) -> None:
    """fp32 on CPU: mean below 1e-5, max below 1e-4 with routing replay."""
    params, options = PATHS[path]
    model = MODELS[family]()
    requests = group_requests(4, 5, **params)
    engine = make_engine(model, **options)
    generations = serve(engine, requests)
    if path == "preempted":
        assert engine.scheduler.num_preemptions > 0
    difference, _ = differences(model, requests, generations, params.get("temperature", 1.0))
    assert difference.mean() < 1e-5
    assert difference.max() < 1e-4


@pytest.mark.parametrize("family", MODELS)
def test_without_replay_every_larger_difference_is_traced_to_another_choice_of_experts(family: str) -> None:
    model = MODELS[family]()
    requests = group_requests(4, 5, max_new_tokens=40)
    generations = serve(make_engine(model), requests)
    samples = [trained_on(r, g) for r, g in zip(requests, generations, strict=True)]
    own = tiny_trainer(model, routing="own").log_probs(samples)
    for result, generation in zip(own, generations, strict=True):
        difference = (result.log_probs - torch.tensor(generation.log_probs)).abs()
        differs = (
            torch.zeros(len(difference), dtype=torch.bool) if result.routes_differ is None else result.routes_differ
        )
        assert difference[~differs].max() < 1e-4


def test_a_falsified_route_is_seen_from_its_token_on() -> None:
    """Keys and values of the token reach all later predictions."""
    model = tiny_moe()
    request = group_requests(1, 1, max_new_tokens=10)[0]
    generation = serve(make_engine(model), [request])[0]
    routes = generation.routed_experts
    assert routes is not None
    at = len(request.prompt) + 3
    routes[at, 0] = (routes[at, 0] + 1) % model.config.num_experts
    result = tiny_trainer(model, routing="own").log_probs(
        [trained_on(request, replace(generation, routed_experts=routes))]
    )
    assert result[0].routes_differ is not None
    assert result[0].routes_differ.tolist() == [False] * 4 + [True] * 6


def test_the_kept_nucleus_and_its_log_probs_are_numpys() -> None:
    """Smallest set of likeliest tokens that reaches top_p, within the top_k; log-probs renormalised over it."""
    model = tiny_dense()
    requests = group_requests(2, 4, temperature=0.7, top_p=0.8, top_k=5)
    for request, generation in zip(requests, serve(make_engine(model), requests), strict=True):
        tokens = request.prompt + generation.token_ids
        logits = packed_logits(model, [tokens]).detach().numpy()[len(request.prompt) - 1 : -1] / 0.7
        offsets, ids = generation.kept_token_offsets, generation.kept_token_ids
        assert offsets is not None
        assert ids is not None
        assert len(offsets) == len(generation.token_ids) + 1
        for row, token in enumerate(generation.token_ids):
            probs = np.exp(logits[row].astype(np.float64) - logits[row].max())
            probs /= probs.sum()
            order = np.argsort(-probs, kind="stable")
            count = min(5, int(np.searchsorted(probs[order].cumsum(), 0.8)) + 1)
            kept = set(order[:count].tolist())
            assert set(ids[offsets[row] : offsets[row + 1]]) == kept
            assert token in kept
            wanted = np.log(probs[token] / probs[list(kept)].sum())
            np.testing.assert_allclose(generation.log_probs[row], wanted, atol=1e-5)


@pytest.mark.parametrize("family", MODELS)
def test_greedy_decoding_gives_the_tokens_of_transformers_generate(family: str) -> None:
    theirs = hf_model(CONFIGS[family](0))
    requests = group_requests(3, 1, max_new_tokens=24, temperature=0.0)
    generations = serve(make_engine(twin_of(theirs)), requests)
    for request, generation in zip(requests, generations, strict=True):
        prompt = torch.tensor([request.prompt])
        wanted = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False, pad_token_id=0
        )
        assert generation.token_ids == wanted[0, len(request.prompt) :].tolist()


def test_greedy_log_probs_are_those_of_temperature_one() -> None:
    model = tiny_dense()
    requests = group_requests(2, 2, temperature=0.0)
    difference, _ = differences(model, requests, serve(make_engine(model), requests), 1.0)
    assert difference.max() < 1e-4


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"tie_word_embeddings": False}])
def test_the_engine_reads_the_trainers_own_storage_and_follows_its_steps(changes: dict[str, Any]) -> None:
    model = tiny_moe(**changes)
    trainer = tiny_trainer(model, lr=0.5)
    with trainer.rollout_weights() as served:
        engine = make_engine(served)
        ours = {name: p.data_ptr() for name, p in trainer.model.named_parameters(remove_duplicate=False)}
        read = {name: p.data_ptr() for name, p in engine.runner.model.named_parameters(remove_duplicate=False)}
        assert read == ours
        requests = group_requests(2, 3)
        before = serve(engine, requests)
        samples = [trained_on(r, g) for r, g in zip(requests, before, strict=True)]
        for number, sample in enumerate(samples):
            sample.advantage, sample.loss_weight = float(number - 2), 0.1
        trainer.step(samples)
        engine.set_version(trainer.version)
        after = serve(engine, requests)
        assert read == {n: p.data_ptr() for n, p in engine.runner.model.named_parameters(remove_duplicate=False)}
    assert [g.token_ids for g in before] != [g.token_ids for g in after]
    difference, _ = differences(model, requests, after, 1.0)
    assert difference.max() < 1e-4
    assert {version for g in before for version in g.weight_versions} == {"0"}
    assert {version for g in after for version in g.weight_versions} == {"1"}


def test_no_module_of_the_engine_holds_a_second_copy_of_a_weight() -> None:
    """Beyond the cache and the routes, the engine owns no tensor."""
    model = tiny_moe()
    engine = make_engine(model)
    caches = engine.runner.caches
    holders = (engine.runner, caches)
    held = [value for holder in holders for value in vars(holder).values() if isinstance(value, torch.Tensor)]
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert all(t.untyped_storage().data_ptr() not in storages for t in held)
    assert {id(t) for t in held} == {
        id(t) for t in (caches.kv, caches.conv, caches.delta, engine.runner.routed_experts)
    }
