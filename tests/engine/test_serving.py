"""Requests of every kind, many at a time: order, sharing, preemption, aborts and failures."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from serving import Request, answers, group_requests, letters, make_engine, serve
from tiny_models import random_documents, tiny_dense, tiny_moe, tiny_next

from lockstep.errors import RolloutError
from lockstep.rollout.embedded import EmbeddedEngine
from lockstep.rollout.embedded.sequence import Sequence
from lockstep.rollout.engine import Generation, SamplingParams


def tokens(generations: list[Generation]) -> list[list[int]]:
    return [generation.token_ids for generation in generations]


@pytest.mark.parametrize(
    "options",
    [
        {"max_running": 1},
        {"max_running": 3},
        {"max_prefill_tokens": 10},
        {"num_blocks": 20},
        {"block_size": 64, "num_blocks": 32},
    ],
    ids=str,
)
@pytest.mark.parametrize("model", [tiny_dense(), tiny_moe(), tiny_next()], ids=["dense", "moe", "next"])
def test_a_sample_does_not_depend_on_what_runs_beside_it(model: Any, options: dict[str, Any]) -> None:
    requests = group_requests(3, 4, top_p=0.9)
    wanted = tokens(serve(make_engine(model), requests))
    assert tokens(serve(make_engine(model, **options), requests)) == wanted
    assert len({tuple(t) for t in wanted}) == len(wanted), "samples of a group must differ"


def test_a_sample_alone_is_the_sample_in_a_crowd() -> None:
    model, requests = tiny_moe(), group_requests(3, 4)
    crowd = serve(make_engine(model), requests)
    alone = [serve(make_engine(model), [request])[0] for request in requests]
    assert tokens(alone) == tokens(crowd)


def test_the_order_of_arrival_does_not_matter() -> None:
    model, requests = tiny_moe(), group_requests(3, 4)
    order = list(range(len(requests)))
    random.Random(0).shuffle(order)
    shuffled = serve(make_engine(model, max_running=2), [requests[i] for i in order])
    wanted = serve(make_engine(model, max_running=2), requests)
    assert tokens(shuffled) == [wanted[i].token_ids for i in order]


def test_another_seed_samples_other_tokens() -> None:
    model, requests = tiny_dense(), group_requests(2, 2)
    assert tokens(serve(make_engine(model, seed=1), requests)) != tokens(serve(make_engine(model, seed=2), requests))


def test_a_group_computes_its_prompt_once() -> None:
    """9 prompt tokens in blocks of 4: two whole blocks are found by all but the first sample."""
    requests = group_requests(1, 6)
    generations = serve(make_engine(tiny_moe()), requests)
    assert [g.cached_tokens for g in generations] == [0, 8, 8, 8, 8, 8]
    unshared = serve(make_engine(tiny_moe(), block_size=16), requests)
    assert [g.cached_tokens for g in unshared] == [0] * 6
    assert tokens(unshared) == tokens(generations)


def test_a_group_of_a_hybrid_computes_its_prompt_once_and_goes_on_from_a_copy_of_its_state() -> None:
    model, requests = tiny_next(), group_requests(2, 5)
    generations = serve(make_engine(model), requests)
    assert [g.cached_tokens for g in generations] == [0, 8, 8, 8, 8] * 2
    unshared = serve(make_engine(model, block_size=16), requests)
    assert [g.cached_tokens for g in unshared] == [0] * 10
    assert tokens(unshared) == tokens(generations)
    for shared, alone in zip(generations, unshared, strict=True):
        torch.testing.assert_close(torch.tensor(shared.log_probs), torch.tensor(alone.log_probs), atol=1e-5, rtol=0)
        assert shared.routed_experts is not None
        assert alone.routed_experts is not None
        assert (shared.routed_experts == alone.routed_experts).all()


def test_a_later_turn_of_a_hybrid_finds_the_whole_blocks_of_the_prompt_before() -> None:
    """The first prompt has 9 tokens, the second 23, in blocks of 4; where a response ended no state is kept."""
    model = tiny_next()
    engine = make_engine(model)
    request, cached = group_requests(1, 1)[0], []
    for turn in range(3):
        warm, cold = serve(engine, [request])[0], serve(make_engine(model), [request])[0]
        cached.append(warm.cached_tokens)
        assert warm.token_ids == cold.token_ids
        torch.testing.assert_close(torch.tensor(warm.log_probs), torch.tensor(cold.log_probs), atol=1e-5, rtol=0)
        request = replace(request, prompt=request.prompt + warm.token_ids + [3, 4], stream=(0, 0, 0, turn + 1))
    assert cached == [0, 8, 20]
    engine.set_version(1)
    assert serve(engine, [request])[0].cached_tokens == 0


@pytest.mark.parametrize("model", [tiny_moe(), tiny_next()], ids=["moe", "next"])
def test_prompts_in_chunks_are_computed_once_and_sampled_alike(model: Any) -> None:
    """Prompts of 30 and 31 tokens come in chunks of 7 while other samples decode."""
    requests = group_requests(2, 4, prompt_tokens=30)
    whole = serve(make_engine(model), requests)
    engine = make_engine(model, max_prefill_tokens=7)
    widths, schedule = [], engine.scheduler.schedule

    def watched() -> list[Sequence]:
        scheduled = schedule()
        widths.append(sum(s.num_scheduled_tokens for s in scheduled))
        return scheduled

    engine.scheduler.schedule = watched  # type: ignore[method-assign]
    chunked = serve(engine, requests)
    assert max(widths) <= 7 + len(requests)
    assert tokens(chunked) == tokens(whole)
    assert [g.cached_tokens for g in chunked] == [0, 28, 28, 28] * 2
    for one, other in zip(chunked, whole, strict=True):
        assert one.routed_experts is not None
        assert other.routed_experts is not None
        assert (one.routed_experts == other.routed_experts).all()


def test_a_second_turn_finds_the_first_one_in_the_cache() -> None:
    model = tiny_moe()
    engine = make_engine(model)
    first = group_requests(1, 1)[0]
    answer = serve(engine, [first])[0]
    second = replace(first, prompt=first.prompt + answer.token_ids + [3, 4], stream=(0, 0, 0, 1))
    warm, cold = serve(engine, [second])[0], serve(make_engine(model), [second])[0]
    assert (warm.cached_tokens, cold.cached_tokens) == (20, 0)
    assert warm.token_ids == cold.token_ids
    torch.testing.assert_close(torch.tensor(warm.log_probs), torch.tensor(cold.log_probs), atol=1e-5, rtol=0)
    assert warm.routed_experts is not None
    assert cold.routed_experts is not None
    assert (warm.routed_experts == cold.routed_experts).all()


@pytest.mark.parametrize("most_padded_scores", [1, 40 * 40])
def test_samples_that_are_computed_in_several_passes_find_the_prompt_of_their_group(most_padded_scores: int) -> None:
    """An earlier request leaves a prefix that all share, so the first of a group is padded like the others."""
    model, system = tiny_moe(), random_documents([8], seed=1)[0]
    requests = [replace(r, prompt=system + r.prompt) for r in group_requests(2, 4, prompt_tokens=30)]
    wanted = tokens(serve(make_engine(model), requests))
    engine = make_engine(model)
    engine.runner.most_padded_scores = most_padded_scores
    serve(engine, [Request([*system, 5], SamplingParams(max_new_tokens=1), (0, 0, 9, 9))])
    generations = serve(engine, requests)
    assert [g.cached_tokens for g in generations] == [8, 36, 36, 36, 8, 36, 36, 36]
    assert tokens(generations) == wanted


def test_new_weights_find_an_empty_prefix_cache() -> None:
    engine, requests = make_engine(tiny_dense()), group_requests(1, 2)
    serve(engine, requests)
    assert serve(engine, requests)[0].cached_tokens == 8
    engine.set_version(1)
    assert serve(engine, requests)[0].cached_tokens == 0


def test_weights_may_not_change_under_running_requests() -> None:
    engine = make_engine(tiny_dense())
    request = group_requests(1, 1)[0]
    engine.add(engine.sequence(request.prompt, request.params, request.stream))
    with pytest.raises(AssertionError, match="under running sequences"):
        engine.set_version(1)


# How a response ends


def ending(token_ids: list[int], params: SamplingParams) -> tuple[int, str]:
    """After how many tokens, and why, the rules end a response, by a plain scan."""
    for count in range(1, params.max_new_tokens + 1):
        text = letters(token_ids[:count])
        if token_ids[count - 1] in params.stop_token_ids or any(stop in text for stop in params.stop):
            return count, "stop"
    return params.max_new_tokens, "length"


@pytest.mark.parametrize(
    "limits",
    [
        {"stop_token_ids": (3, 17, 40)},
        {"stop": ("b",)},
        {"stop": ("c", "zzz", "ab")},
        {"max_new_tokens": 1},
        {"stop": ("a",), "stop_token_ids": (60, 61, 62)},
    ],
    ids=str,
)
def test_a_response_ends_where_a_plain_scan_of_the_free_running_one_says(limits: dict[str, Any]) -> None:
    model = tiny_dense()
    free = serve(make_engine(model), group_requests(3, 8, max_new_tokens=30))
    params = {"max_new_tokens": 30} | limits
    requests = group_requests(3, 8, **params)
    reasons = set()
    for request, wanted, got in zip(requests, free, serve(make_engine(model), requests), strict=True):
        count, reason = ending(wanted.token_ids, request.params)
        assert (got.token_ids, got.finish_reason) == (wanted.token_ids[:count], reason)
        reasons.add(got.finish_reason)
    assert len(reasons) == (1 if limits == {"max_new_tokens": 1} else 2)


def test_a_stop_string_may_begin_in_what_an_earlier_request_has_written() -> None:
    engine = make_engine(tiny_dense())
    free = serve(engine, group_requests(1, 1, max_new_tokens=30))[0].token_ids
    text, request = letters(free), group_requests(1, 1)[0]
    stop = text[9:12]
    assert text.find(stop) == 9
    rest = Request(
        request.prompt + free[:10],
        SamplingParams(max_new_tokens=20, stop=(stop,), continued_tokens=10),
        request.stream,
    )
    generation = serve(engine, [rest])[0]
    assert (generation.token_ids, generation.finish_reason) == (free[10:12], "stop")


class _Bytes:
    """A tokenizer whose tokens are single bytes, as byte-level BPE spells rare characters."""

    def __call__(self, token_ids: list[int]) -> str:
        return bytes(token_ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("stop", ["END", "Ω", "😀", "日本"])
def test_a_stop_string_is_found_though_it_is_spread_over_many_tokens(stop: str) -> None:
    """The engine is led through a text byte by byte; it must stop with the stop string's last byte."""
    text = f"x{stop}yz".encode()
    engine = make_engine(tiny_dense(), decode_text=_Bytes())
    sequence = engine.sequence([1, 2], SamplingParams(max_new_tokens=len(text), stop=(stop,)), (0,))
    for count, byte in enumerate(text, start=1):
        sequence.tokens.append(byte)
        reason = engine._finish_reason(sequence)
        assert (reason == "stop") == (count >= 1 + len(stop.encode())) or count > 1 + len(stop.encode())
        if reason == "stop":
            assert count == 1 + len(stop.encode())
            return
    raise AssertionError("the stop string was overlooked")


def test_stop_ids_do_not_end_a_response_before_its_least_length() -> None:
    stops = tuple(range(0, 97, 2))
    requests = group_requests(3, 8, max_new_tokens=20, min_new_tokens=5, stop_token_ids=stops)
    generations = serve(make_engine(tiny_dense()), requests)
    for generation in generations:
        assert len(generation.token_ids) >= 5
        assert not set(generation.token_ids[:4]) & set(stops)
    assert {g.finish_reason for g in generations} == {"stop"}


# Soak, aborts and failures


def ragged_requests(count: int, seed: int) -> list[Request]:
    draw = random.Random(seed)
    prompts = random_documents([draw.randrange(1, 30) for _ in range(count // 4)], seed)
    return [
        Request(
            prompts[draw.randrange(len(prompts))],
            SamplingParams(
                max_new_tokens=draw.randrange(1, 12),
                temperature=draw.choice([0.0, 0.7, 1.0]),
                top_p=draw.choice([1.0, 1.0, 0.8]),
                top_k=draw.choice([-1, -1, 5]),
                stop=draw.choice([(), (), ("ab",)]),
                stop_token_ids=draw.choice([(), (3, 4, 5)]),
            ),
            (0, 0, number, draw.randrange(10)),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize(("model", "count"), [(tiny_moe(num_hidden_layers=2), 1000), (tiny_next(), 400)])
def test_ragged_requests_with_aborts_and_preemption_leak_no_block_and_no_slot(model: Any, count: int) -> None:
    engine = make_engine(model, num_blocks=24, max_running=24, max_prefill_tokens=40)
    requests = ragged_requests(count, seed=0)
    draw = random.Random(1)

    async def impatient(request: Request) -> Generation | None:
        """Some callers give up after a while."""
        call = engine.generate(request.prompt, request.params, request.stream)
        if draw.random() > 0.1:
            return await call
        task = asyncio.ensure_future(call)
        for _ in range(draw.randrange(200)):
            await asyncio.sleep(0)
        task.cancel()
        return (await asyncio.gather(task, return_exceptions=True))[0] if not task.done() else None

    async def soak() -> list[Any]:
        results = []
        for start in range(0, len(requests), 100):
            calls = [impatient(request) for request in requests[start : start + 100]]
            if start % 500 == 0:
                asyncio.get_running_loop().call_later(0.02, engine._abort_all)
            results += await asyncio.gather(*calls)
            await engine.drain()
            engine.set_version(engine.version + 1)  # checks that every block and slot is free
        return results

    results = asyncio.run(asyncio.wait_for(soak(), 100))
    finished = [(r, g) for r, g in zip(requests, results, strict=True) if isinstance(g, Generation)]
    assert len(finished) > 0.85 * count
    assert engine.scheduler.num_preemptions > 0
    assert {g.finish_reason for _, g in finished} == {"stop", "length", "abort"}
    for request, generation in finished:
        count = len(generation.token_ids)
        assert count <= request.params.max_new_tokens
        assert len(generation.log_probs) == len(generation.weight_versions) == count
        assert (generation.finish_reason == "length") <= (count == request.params.max_new_tokens)
        if request.params.cuts_tail:
            assert generation.kept_token_offsets is not None
            assert len(generation.kept_token_offsets) == count + 1
        if generation.routed_experts is not None:
            assert len(generation.routed_experts) == len(request.prompt) + count - 1


async def some_tokens(engine: EmbeddedEngine) -> None:
    """Wait until responses are under way."""
    while not any(sequence.num_new_tokens > 5 for sequence in list(engine.scheduler.running)):
        await asyncio.sleep(0)


def test_an_abort_returns_what_was_sampled_so_far() -> None:
    model = tiny_moe()
    requests = group_requests(2, 4, max_new_tokens=400, prompt_tokens=4)
    engine = make_engine(model, num_blocks=2048)
    whole = serve(make_engine(model, num_blocks=2048), requests)

    async def abort_midway() -> list[Generation]:
        calls = asyncio.ensure_future(answers(engine, requests))
        await some_tokens(engine)
        await engine.abort_all()
        return await calls

    partial = asyncio.run(abort_midway())
    engine.blocks.check_integrity()
    assert {g.finish_reason for g in partial} == {"abort"}
    for part, full in zip(partial, whole, strict=True):
        count = len(part.token_ids)
        assert 0 < count < 400
        assert part.token_ids == full.token_ids[:count]
        assert part.log_probs == full.log_probs[:count]
        assert part.routed_experts is not None
        assert full.routed_experts is not None
        assert (part.routed_experts == full.routed_experts[: len(part.routed_experts)]).all()


def test_a_cancelled_request_leaves_and_the_others_are_not_disturbed() -> None:
    model, requests = tiny_dense(), group_requests(2, 4, max_new_tokens=100)
    wanted = serve(make_engine(model), requests)
    engine = make_engine(model)

    async def cancel_some() -> list[Any]:
        tasks = [asyncio.ensure_future(engine.generate(r.prompt, r.params, r.stream)) for r in requests]
        await some_tokens(engine)
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await engine.drain()
        return results

    results = asyncio.run(cancel_some())
    engine.set_version(1)
    assert tokens(results[1::2]) == tokens(wanted[1::2])
    assert all(isinstance(result, asyncio.CancelledError) for result in results[::2])


def test_a_request_that_cannot_fit_is_refused_and_the_others_are_served() -> None:
    engine = make_engine(tiny_dense(), num_blocks=8)
    good = group_requests(1, 2, max_new_tokens=10)
    bad = replace(good[0], params=SamplingParams(max_new_tokens=100))

    async def mixed() -> list[Any]:
        calls = [engine.generate(r.prompt, r.params, r.stream) for r in (good[0], bad, good[1])]
        return list(await asyncio.gather(*calls, return_exceptions=True))

    first, refused, second = asyncio.run(mixed())
    assert isinstance(refused, RolloutError)
    assert refused.field == "--rollout-max-tokens"
    assert len(first.token_ids) == len(second.token_ids) == 10


def failing_at(engine: EmbeddedEngine, step: int, where: str) -> None:
    """Break a part of the engine at its `step`-th use."""
    owner, name = {
        "model": (engine.runner, "run"),
        "text": (engine, "_decode_text"),
        "schedule": (engine.scheduler, "schedule"),
    }[where]
    original, calls = getattr(owner, name), 0

    def broken(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            raise RuntimeError("the device is on fire")
        return original(*arguments)

    setattr(owner, name, broken)


@pytest.mark.parametrize("where", ["model", "text", "schedule"])
@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_failure_reaches_every_caller_and_the_engine_recovers(where: str, step: int) -> None:
    """Also those whose response was finished by the very step that failed."""
    model = tiny_moe()
    many = group_requests(4, 3, stop=("qqq",))
    requests = [replace(r, params=replace(r.params, max_new_tokens=1 + i % 3)) for i, r in enumerate(many)]
    engine = make_engine(model, max_running=8)
    failing_at(engine, step, where)

    async def all_outcomes() -> list[Any]:
        calls = (engine.generate(r.prompt, r.params, r.stream) for r in requests)
        return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 20)

    outcomes = asyncio.run(all_outcomes())
    failed = [o for o in outcomes if not isinstance(o, Generation)]
    assert {str(o) for o in failed} == {"the device is on fire"}
    assert not engine.has_work
    engine.set_version(engine.version)  # every block came back
    assert tokens(serve(engine, requests)) == tokens(serve(make_engine(model), requests))


def test_a_failed_prefill_leaves_no_prefix_behind() -> None:
    """Blocks are keyed when they are handed out, before their keys and values are computed."""
    model, requests = tiny_dense(), group_requests(1, 1)
    engine = make_engine(model)
    failing_at(engine, 1, "model")
    with pytest.raises(RuntimeError, match="on fire"):
        asyncio.run(answers(engine, requests))
    generation = serve(engine, requests)[0]
    assert generation.cached_tokens == 0
    assert tokens([generation]) == tokens(serve(make_engine(model), requests))
