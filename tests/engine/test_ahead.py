"""The runner of a GPU, on the CPU: the same samples as the plain runner's, though tokens arrive one call later."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from serving import Request, answers, group_requests, make_engine, serve
from tiny_models import tiny_dense, tiny_moe, tiny_next
from torch import nn

from lockstep.kernels.address_range import AddressRange
from lockstep.kernels.route import route
from lockstep.models import LanguageModel
from lockstep.models.layers.moe import Experts
from lockstep.rollout.embedded import EmbeddedEngine
from lockstep.rollout.embedded.ahead import AheadRunner
from lockstep.rollout.embedded.block_manager import BlockManager
from lockstep.rollout.embedded.choose import make_runner
from lockstep.rollout.embedded.decode import computing_few_rows, default_sizes
from lockstep.rollout.embedded.decode_state import DecodeState
from lockstep.rollout.embedded.runner import ModelRunner
from lockstep.rollout.embedded.sequence import Sequence
from lockstep.rollout.engine import SamplingParams

MODELS = {"dense": tiny_dense, "moe": tiny_moe, "next": tiny_next}
PATHS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "temperature": ({"temperature": 0.7}, {}),
    "greedy": ({"temperature": 0.0}, {}),
    "everything cut": ({"temperature": 0.7, "top_p": 0.8, "top_k": 5}, {}),
    "minimum length, cut": ({"min_new_tokens": 6, "stop_token_ids": tuple(range(60)), "top_p": 0.8}, {}),
    "stop ids": ({"stop_token_ids": tuple(range(20))}, {}),
    "stop strings": ({"stop": ("b", "xy")}, {}),
    "preempted": ({"max_new_tokens": 30}, {"num_blocks": 28}),
    "small prefills": ({}, {"max_prefill_tokens": 6}),
    "long": ({"max_new_tokens": 280}, {"num_blocks": 1600}),
}


def ahead_engine(model: LanguageModel, *, graph_sizes: tuple[int, ...] | None = (3, 8, 64), **options: Any) -> Any:
    """An engine whose batches are padded to one of few sizes."""
    engine = make_engine(model, **options)
    blocks, most = engine.blocks, engine.scheduler.max_running
    engine.runner = AheadRunner(
        model, num_blocks=blocks.num_blocks, block_size=blocks.block_size, max_running=most, graph_sizes=graph_sizes
    )
    return engine


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", MODELS)
def test_samples_are_those_of_the_plain_runner(family: str, path: str) -> None:
    """Tokens, ends, kept ids and experts equal; log-probs to 1e-5, as other orders of fp32 sums allow."""
    params, options = PATHS[path]
    model = MODELS[family]()
    requests = group_requests(*((1, 2) if path == "long" else (4, 5)), **params)
    engine = ahead_engine(model, **options)
    for ours, plain in zip(serve(engine, requests), serve(make_engine(model, **options), requests), strict=True):
        assert (ours.token_ids, ours.finish_reason) == (plain.token_ids, plain.finish_reason)
        assert (ours.kept_token_ids, ours.kept_token_offsets) == (plain.kept_token_ids, plain.kept_token_offsets)
        torch.testing.assert_close(torch.tensor(ours.log_probs), torch.tensor(plain.log_probs), atol=1e-5, rtol=0)
        if plain.routed_experts is not None:
            assert ours.routed_experts is not None
            assert (ours.routed_experts == plain.routed_experts).all()
    if path == "preempted":
        assert engine.scheduler.num_preemptions > 0
    if path == "long":
        assert engine.runner.state.width > 64, "tables grew while nothing was lost"


@pytest.mark.parametrize("graph_sizes", [(1,), (64,), (2, 7), None], ids=str)
def test_padding_a_batch_changes_no_sample(graph_sizes: tuple[int, ...] | None) -> None:
    model, requests = tiny_next(), group_requests(3, 4)
    wanted = [g.token_ids for g in serve(make_engine(model), requests)]
    assert [g.token_ids for g in serve(ahead_engine(model, graph_sizes=graph_sizes), requests)] == wanted


def test_a_token_arrives_one_call_after_it_was_started() -> None:
    engine = ahead_engine(tiny_dense())
    request = group_requests(1, 1, max_new_tokens=3)[0]
    sequence = engine.sequence(request.prompt, request.params, request.stream)
    engine.add(sequence)
    known = []
    while engine.has_work:
        engine.step()
        known.append((sequence.num_new_tokens, sequence.num_pending_tokens))
    assert known == [(0, 1), (1, 1), (2, 1), (3, 0)], "nothing is started beyond the most tokens"
    engine.blocks.check_integrity()


def test_the_token_that_was_started_before_a_stop_was_seen_is_dropped() -> None:
    model, request = tiny_moe(), group_requests(1, 1, max_new_tokens=20)[0]
    free = serve(make_engine(model), [request])[0]
    stops = Request(
        request.prompt, SamplingParams(max_new_tokens=20, stop_token_ids=(free.token_ids[4],)), (0, 0, 0, 0)
    )
    at = free.token_ids.index(free.token_ids[4]) + 1
    engine = ahead_engine(model)
    other = group_requests(2, 1, max_new_tokens=20)[1]
    generations = serve(engine, [stops, other])
    assert generations[0].token_ids == free.token_ids[:at]
    assert len(generations[0].log_probs) == len(generations[0].weight_versions) == at
    assert len(generations[1].token_ids) == 20


def test_new_weights_do_not_meet_tokens_of_old_ones() -> None:
    """A stopped sequence's last pass is never read; it must not turn up in the next rollout."""
    model, requests = tiny_dense(), group_requests(2, 3, stop_token_ids=tuple(range(30)))
    engine = ahead_engine(model)
    first = [g.token_ids for g in serve(engine, requests)]
    engine.set_version(1)
    again = serve(engine, requests)
    assert [g.token_ids for g in again] == first
    assert {version for g in again for version in g.weight_versions} == {"1"}


def test_after_a_failure_nothing_of_the_passes_under_way_turns_up() -> None:
    model, requests = tiny_moe(), group_requests(2, 3, max_new_tokens=3)  # their last tokens are on the way then
    engine = ahead_engine(model)
    schedule, calls = engine.scheduler.schedule, 0

    def broken() -> list[Sequence]:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("the device is on fire")
        return list(schedule())

    engine.scheduler.schedule = broken
    with pytest.raises(RuntimeError, match="on fire"):
        asyncio.run(answers(engine, requests))
    wanted = [g.token_ids for g in serve(make_engine(model), requests)]
    assert [g.token_ids for g in serve(engine, requests)] == wanted


def test_a_sequence_that_lost_its_blocks_is_not_decoded_from_its_old_row() -> None:
    """It may find all but its last token in the prefix cache, in other blocks: one token to compute, as in decoding."""
    state = DecodeState(4, torch.device("cpu"), block_size=4, spare_slot=0)
    blocks = BlockManager(8, 4)
    sequence = Sequence(list(range(8)), SamplingParams(max_new_tokens=8), (0,), 1)
    assert blocks.allocate(sequence)
    state.reserve([sequence])
    state.begin([sequence], torch.tensor([8]))
    sequence.tokens.append(8)
    sequence.num_computed_tokens = 8
    assert state.row_of(sequence) is not None
    blocks.release(sequence)
    sequence.block_table, sequence.num_computed_tokens = [6, 7, 3], 8
    assert sequence.num_uncomputed_tokens == 1
    assert state.row_of(sequence) is None


def test_tables_that_grow_for_a_longer_sequence_keep_those_that_are_there() -> None:
    state = DecodeState(2, torch.device("cpu"), block_size=4, spare_slot=0)
    short = Sequence([1] * 9, SamplingParams(max_new_tokens=8), (0,), 1)
    short.block_table = [5, 3, 6]
    state.reserve([short])
    state.begin([short], torch.tensor([7]))
    width = state.width
    assert state.reserve([Sequence([1], SamplingParams(max_new_tokens=4 * width), (1,), 1)]), "it lies elsewhere now"
    assert state.width > width
    row = state.rows_with_new_blocks([short])[0][0]
    assert state.block_tables_RM[row, :4].tolist() == [5, 3, 6, 0]
    short.block_table.append(2)
    _, places, blocks = state.rows_with_new_blocks([short])
    state.add_blocks(torch.tensor(places), torch.tensor(blocks))
    assert state.block_tables_RM[row, :5].tolist() == [5, 3, 6, 2, 0]


def test_rows_of_sequences_that_left_are_given_to_others() -> None:
    state = DecodeState(2, torch.device("cpu"), block_size=4, spare_slot=0)
    for number in range(6):
        sequence = Sequence([1, 2], SamplingParams(max_new_tokens=8), (number,), 1)
        sequence.block_table, sequence.num_computed_tokens = [number], 1
        state.reserve([sequence])
        state.begin([sequence], torch.tensor([5]))
        assert state.row_of(sequence) is not None
        sequence.block_table = []


def test_a_sequence_that_comes_back_does_not_take_the_row_that_another_has_got_meanwhile() -> None:
    state = DecodeState(2, torch.device("cpu"), block_size=4, spare_slot=0)
    first, second, third = (Sequence([1, 2], SamplingParams(max_new_tokens=8), (number,), 1) for number in range(3))

    def begin(sequence: Sequence) -> None:
        sequence.block_table, sequence.num_computed_tokens = [0], 1
        state.reserve([sequence])
        state.begin([sequence], torch.tensor([5]))

    begin(first)
    begin(second)
    first.block_table = []
    begin(third)
    second.block_table = []
    begin(first)
    assert {state.row_of(first), state.row_of(third)} == {0, 1}


@pytest.mark.parametrize("model", [tiny_dense(attention_bias=False), tiny_next(attention_bias=True)])
def test_what_is_computed_otherwise_for_few_rows_is_as_before_afterwards(model: LanguageModel) -> None:
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    before = [dict(vars(module)) for module in model.modules()]
    own = [module.compute for module in experts]

    def capture() -> None:
        with computing_few_rows(model, 1):
            assert all(module.compute is not compute for module, compute in zip(experts, own, strict=True))
            linears = [module for module in model.model.layers.modules() if type(module) is nn.Linear]
            assert any("forward" in vars(module) for module in linears)
            raise RuntimeError("the capture failed")

    with pytest.raises(RuntimeError, match="the capture failed"):
        capture()
    assert [vars(module) for module in model.modules()] == before


def test_the_router_of_the_sampler_chooses_and_weighs_as_that_of_the_trainer() -> None:
    draw = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(50, 12, generator=draw)
    for renormalises in (False, True):
        experts_TS, weights_TS = route(logits_TE, 3, renormalises=renormalises)
        for token, row in enumerate(logits_TE.double()):
            probs = row.exp() / row.exp().sum()
            best = sorted(range(12), key=lambda expert: -float(probs[expert]))[:3]
            assert experts_TS[token].tolist() == best
            wanted = probs[best] / (probs[best].sum() if renormalises else 1.0)
            torch.testing.assert_close(weights_TS[token].double(), wanted, atol=1e-6, rtol=0)


def test_sizes_of_graphs_reach_the_most_that_runs_and_pad_by_seven_rows_or_a_quarter() -> None:
    for most in (1, 5, 8, 64, 100, 256, 300, 512):
        sizes = default_sizes(most)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == most
        for count in range(9, most + 1):
            size = next(size for size in sizes if size >= count)
            assert size - count <= max(7, count / 4)


def test_without_a_gpu_memory_is_a_plain_tensor_and_the_plain_runner_computes() -> None:
    memory = AddressRange(1000, torch.device("cpu"))
    memory.release()
    assert memory.is_held
    assert not memory.can_release
    assert memory.data.tolist() == [0] * 1000
    engine = make_engine(tiny_dense())
    assert type(engine.runner) is ModelRunner
    requests = group_requests(1, 2)
    serve(engine, requests)
    engine.release_memory()
    assert serve(engine, requests)[0].cached_tokens == 8, "nothing was given away, so prefixes are still there"


def test_bf16_without_a_gpu_gets_the_plain_runner() -> None:
    model = tiny_dense().bfloat16()
    sizes: dict[str, Any] = {"num_blocks": 8, "block_size": 4, "max_running": 2}
    assert type(make_runner(model, **sizes, peers=None, graph_sizes=())) is ModelRunner, "there is no GPU here"


def test_an_aborted_request_keeps_what_had_arrived() -> None:
    model = tiny_moe()
    requests = group_requests(1, 3, max_new_tokens=60)
    whole = serve(make_engine(model), requests)
    engine: EmbeddedEngine = ahead_engine(model)
    sequences = [engine.sequence(r.prompt, r.params, r.stream) for r in requests]
    for sequence in sequences:
        engine.add(sequence)
    for _ in range(10):
        engine.step()
    sequences[1].finish_reason = "abort"
    aborted = engine.finish_aborted()
    assert aborted == [sequences[1]]
    while engine.has_work:
        engine.step()
    engine.blocks.check_integrity()
    for sequence, full in zip(sequences, whole, strict=True):
        assert sequence.generation is not None
        part = sequence.generation
        assert part.token_ids == full.token_ids[: len(part.token_ids)]
        assert part.routed_experts is not None
        assert full.routed_experts is not None
        assert (part.routed_experts == full.routed_experts[: len(part.routed_experts)]).all()
    assert sequences[1].generation is not None
    assert len(sequences[1].generation.token_ids) == 9
