"""One real server for the whole module: what it samples, and weights that reach it."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from real_servers import START_S, ask, engine_of, load, score, source_of, start_fleet
from tiny_models import tiny_trainer

from lockstep.errors import RolloutError
from lockstep.models import LanguageModel
from lockstep.models.layers.moe import top_k_experts
from lockstep.rollout.embedded import EmbeddedEngine
from lockstep.rollout.engine import Generation, SamplingParams
from lockstep.rollout.sglang import SGLangEngine
from lockstep.rollout.sglang.engine import PauseMode
from lockstep.rollout.sglang.fleet import ServerFleet
from lockstep.trainer.batch import TrainSample
from lockstep.weight_sync import BroadcastTransport, DiskTransport, TensorTransport

PROMPTS = [[5, 6, 7, 8, 9], [10, 20, 30], [40, 41, 42, 43, 44, 45, 46]]
LONG = 120
CLOSE = 1e-4
"""Both sides compute in fp32; measured differences stay below 1e-5."""


@pytest.fixture(scope="module")
def fleet(folders: list[Path], model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFleet]:
    work = tmp_path_factory.mktemp("fleet")
    fleet = start_fleet(folders[0], model, DiskTransport(work / "disk", timeout_s=120), work)
    try:
        fleet.wait_until_ready()
        yield fleet
    finally:
        fleet.close()


@pytest.fixture
def engine(fleet: ServerFleet) -> SGLangEngine:
    engine = engine_of(fleet)
    engine.set_version(0)
    return engine


def test_greedy_tokens_log_probs_and_experts_are_those_of_the_embedded_engine(
    engine: SGLangEngine, model: LanguageModel
) -> None:
    served = ask(engine, PROMPTS, max_new_tokens=8, temperature=0.0)
    embedded = EmbeddedEngine(
        model, num_blocks=64, block_size=16, max_running=8, max_prefill_tokens=512, decode_text=str, seed=1
    )
    ours = ask(embedded, PROMPTS, max_new_tokens=8, temperature=0.0)  # type: ignore[arg-type]
    embedded.close()
    for prompt, theirs, mine in zip(PROMPTS, served, ours, strict=True):
        assert theirs.token_ids == mine.token_ids
        assert theirs.log_probs == pytest.approx(mine.log_probs, abs=CLOSE)
        assert theirs.routed_experts is not None
        assert theirs.routed_experts.shape == (len(prompt) + 7, 2, 2)
        assert theirs.routed_experts.tolist() == mine.routed_experts.tolist()  # type: ignore[union-attr]
        assert theirs.finish_reason == mine.finish_reason
        assert theirs.weight_versions == ["0"] * 8


def test_the_trainer_computes_with_the_experts_that_the_server_chose(engine: SGLangEngine, folders: list[Path]) -> None:
    """Under other weights, whose router would choose others."""
    (generation,) = ask(engine, PROMPTS[2:], max_new_tokens=8)
    served = torch.from_numpy(generation.routed_experts).long()

    def as_served(moe_index: int, probs_TE: torch.Tensor, top_k: int) -> torch.Tensor:
        return torch.cat([served[:, moe_index], top_k_experts(moe_index, probs_TE[-1:], top_k)])

    other = load(folders[1])
    expected, _ = score(other, PROMPTS[2], generation.token_ids, as_served)
    own, _ = score(other, PROMPTS[2], generation.token_ids)
    length = len(generation.token_ids)  # 8, or fewer when it drew the end of the sequence
    sample = TrainSample(
        tokens=PROMPTS[2] + generation.token_ids,
        response_length=length,
        loss_mask=[1] * length,
        rollout_log_probs=generation.log_probs,
        routed_experts=generation.routed_experts,
    )
    (result,) = tiny_trainer(other, routing="rollout").log_probs([sample])
    assert result.log_probs.tolist() == pytest.approx(expected.tolist(), abs=CLOSE)
    assert (own - expected).abs().max() > 100 * CLOSE


def test_log_probs_are_after_temperature(engine: SGLangEngine, model: LanguageModel) -> None:
    (generation,) = ask(engine, PROMPTS[:1], max_new_tokens=8, temperature=0.5)
    hooked = copy.deepcopy(model)
    hooked.lm_head.weight.data.mul_(2.0)
    expected, _ = score(hooked, PROMPTS[0], generation.token_ids)
    assert generation.log_probs == pytest.approx(expected.tolist(), abs=CLOSE)


def test_stop_ids_stop_texts_and_ends_of_sequence_stay_in_the_response(engine: SGLangEngine) -> None:
    (free,) = ask(engine, PROMPTS[:1], max_new_tokens=8, temperature=0.0)
    third = free.token_ids[2]
    (by_id,) = ask(engine, PROMPTS[:1], max_new_tokens=8, temperature=0.0, stop_token_ids=(third,))
    assert (by_id.token_ids, by_id.finish_reason) == (free.token_ids[:3], "stop")
    (by_length,) = ask(engine, PROMPTS[:1], max_new_tokens=2, temperature=0.0)
    assert (by_length.token_ids, by_length.finish_reason) == (free.token_ids[:2], "length")


def test_a_request_that_cannot_fit_is_refused_with_the_servers_words(engine: SGLangEngine) -> None:
    with pytest.raises(RolloutError, match="maximum context length of 128 tokens"):
        ask(engine, PROMPTS[:1], max_new_tokens=2000)
    assert engine.num_lost == 0


def test_abort_hands_back_what_there_is(engine: SGLangEngine, model: LanguageModel) -> None:
    async def aborted() -> list[Generation]:
        tasks = await many_under_way(engine)
        await engine.abort_all()
        generations = list(await asyncio.gather(*tasks))
        await engine.drain()
        return generations

    generations = asyncio.run(asyncio.wait_for(aborted(), START_S))
    partial = [generation for generation in generations if generation.finish_reason == "abort"]
    assert any(0 < len(generation.token_ids) < LONG for generation in partial)
    assert engine.num_lost == 0
    for generation in generations:
        expected, _ = score(model, PROMPTS[0], generation.token_ids)
        assert generation.log_probs == pytest.approx(expected.tolist(), abs=CLOSE)


def test_cancelled_requests_leave_the_server(engine: SGLangEngine) -> None:
    async def cancelled() -> bool:
        tasks = await many_under_way(engine)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await engine.drain()
        return await is_busy(engine)

    assert asyncio.run(asyncio.wait_for(cancelled(), START_S)) is False
    assert engine.num_lost == 0


def updated_in_mid_rollout(engine: SGLangEngine, model: LanguageModel, folders: list[Path]) -> list[Generation]:
    """Requests that are under way when version 0 gives way to version 1, whose weights are others."""

    async def run() -> list[Generation]:
        tasks = await many_under_way(engine)
        model.load_state_dict(load(folders[1]).state_dict())
        engine.set_version(1)
        generations = list(await asyncio.gather(*tasks))
        await engine.drain()
        return generations

    try:
        return asyncio.run(asyncio.wait_for(run(), START_S))
    finally:
        model.load_state_dict(load(folders[0]).state_dict())
        engine.set_version(2)


def test_requests_under_way_go_on_under_new_weights_and_every_token_names_its_own(
    fleet: ServerFleet, model: LanguageModel, folders: list[Path], tmp_path: Path
) -> None:
    fleet.transport = TRANSPORTS["tensor"](tmp_path)
    engine = engine_of(fleet, pause_mode="retract")
    engine.set_version(0)
    generations = updated_in_mid_rollout(engine, model, folders)
    models = [load(folder) for folder in folders]
    mixed = 0
    for generation in generations:
        versions = generation.weight_versions
        num_old = versions.count("0")
        assert versions == ["0"] * num_old + ["1"] * (len(versions) - num_old)
        assert len(versions) == LONG or generation.finish_reason == "stop"
        mixed += 0 < num_old < len(versions)
        (old, old_routes), (new, new_routes) = (score(m, PROMPTS[0], generation.token_ids) for m in models)
        expected = old.tolist()[:num_old] + new.tolist()[num_old:]
        assert generation.log_probs == pytest.approx(expected, abs=CLOSE)
        # The last old token was read first when the first new one was sampled.
        num_old_rows = len(PROMPTS[0]) + num_old - 1 if num_old else 0
        routes = torch.cat([old_routes[:num_old_rows], new_routes[num_old_rows:]])
        assert generation.routed_experts.tolist() == routes.tolist()  # type: ignore[union-attr]
    assert mixed > 0
    assert (engine.num_lost, engine.num_resent) == (0, 0)


@pytest.mark.parametrize("pause_mode", ["abort", "finish"])
def test_requests_under_way_are_handed_back_or_finished_under_the_old_weights(
    pause_mode: PauseMode, fleet: ServerFleet, model: LanguageModel, folders: list[Path], tmp_path: Path
) -> None:
    fleet.transport = TRANSPORTS["tensor"](tmp_path)
    engine = engine_of(fleet, pause_mode=pause_mode)
    engine.set_version(0)
    generations = updated_in_mid_rollout(engine, model, folders)
    for generation in generations:
        assert generation.weight_versions == ["0"] * len(generation.token_ids)
        expected, _ = score(model, PROMPTS[0], generation.token_ids)
        assert generation.log_probs == pytest.approx(expected.tolist(), abs=CLOSE)
    aborted = [generation for generation in generations if generation.finish_reason == "abort"]
    assert any(0 < len(generation.token_ids) < LONG for generation in aborted) == (pause_mode == "abort")
    assert all(len(g.token_ids) == LONG or g.finish_reason in ("stop", "abort") for g in generations)


def test_released_memory_is_filled_again_before_the_next_request(
    fleet: ServerFleet, model: LanguageModel, tmp_path: Path
) -> None:
    """What a CPU cannot show is that memory gets free; here the order of calls has to suit a real server."""
    fleet.transport = TRANSPORTS["tensor"](tmp_path)
    engine, freed = engine_of(fleet), []
    engine.set_version(0)
    fleet.free_memory = lambda: freed.append(fleet.servers[0].version)
    try:
        for _ in range(2):
            (generation,) = ask(engine, PROMPTS[:1], max_new_tokens=6)
            expected, _ = score(model, PROMPTS[0], generation.token_ids)
            assert generation.log_probs == pytest.approx(expected.tolist(), abs=CLOSE)
            with pytest.raises(RolloutError, match="none of them works"):
                ask(engine, PROMPTS[:1], max_new_tokens=6)
            fleet.servers[0].api.post("/weights_checker", {"action": "reset_tensors"})  # lost, as on a GPU
            engine.set_version(0)
    finally:
        fleet.free_memory = None
    assert freed == [None] * 4, "before each weights, and before the caches: no server had its version then"


async def many_under_way(engine: SGLangEngine) -> list[asyncio.Task[Generation]]:
    """Four times what the server runs at once, and it has begun."""
    params = SamplingParams(max_new_tokens=LONG)
    tasks = [asyncio.create_task(engine.generate(PROMPTS[0], params, (0, 0, 0, number))) for number in range(32)]
    while not await is_busy(engine):
        assert not all(task.done() for task in tasks), "the server was too fast to be seen working"
    return tasks


async def is_busy(engine: SGLangEngine) -> bool:
    answer = await asyncio.to_thread(engine.fleet.servers[0].api.get, "/v1/loads?include=core")
    return any(load["num_running_reqs"] for load in answer["loads"])


TRANSPORTS = {
    "disk": lambda folder: DiskTransport(folder / "disk", timeout_s=120),
    "tensor": lambda folder: TensorTransport(bucket_bytes=20_000, tp_size=1, timeout_s=120),
    "nccl": lambda folder: BroadcastTransport(
        backend="gloo", bucket_bytes=20_000, tp_size=1, host="127.0.0.1", timeout_s=120
    ),
}


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_weights_reach_the_server_and_come_back(
    kind: str, engine: SGLangEngine, model: LanguageModel, fleet: ServerFleet, folders: list[Path], tmp_path: Path
) -> None:
    """A to B to A, each seen through log-probs that only these weights give; 20,000 bytes make several buckets."""
    fleet.transport = TRANSPORTS[kind](tmp_path)
    weights = [load(folder).state_dict() for folder in folders]
    try:
        for version, state in ((1, weights[1]), (2, weights[0]), (3, weights[1])):
            model.load_state_dict(state)
            engine.set_version(version)
            for prompt, generation in zip(PROMPTS, ask(engine, PROMPTS, max_new_tokens=6), strict=True):
                expected, routes = score(model, prompt, generation.token_ids)
                assert generation.log_probs == pytest.approx(expected.tolist(), abs=CLOSE)
                assert generation.weight_versions == [str(version)] * len(generation.token_ids)
                assert generation.routed_experts.tolist() == routes.tolist()  # type: ignore[union-attr]
    finally:
        model.load_state_dict(weights[0])
        engine.set_version(4)
        fleet.transport.close([server.api for server in fleet.servers])


def test_a_server_of_somebody_elses_is_updated_and_left_running(
    model: LanguageModel, fleet: ServerFleet, folders: list[Path], tmp_path: Path
) -> None:
    theirs = ServerFleet(
        plan=None,
        addresses=(fleet.servers[0].api.url.removeprefix("http://"),),
        source=source_of(model, folders[0]),
        transport=TRANSPORTS["tensor"](tmp_path),
        hf_folder=folders[0],
        export_folder=tmp_path / "export",
        start_timeout_s=60,
        check_equal=False,
    )
    theirs.wait_until_ready()
    engine = engine_of(theirs)
    engine.set_version(0)
    (generation,) = ask(engine, PROMPTS[:1], max_new_tokens=6)
    expected, _ = score(model, PROMPTS[0], generation.token_ids)
    assert generation.log_probs == pytest.approx(expected.tolist(), abs=CLOSE)
    engine.close()
    assert fleet.servers[0].api.is_healthy(timeout_s=30)


def test_an_update_that_does_not_arrive_whole_is_found(
    engine: SGLangEngine, model: LanguageModel, fleet: ServerFleet, folders: list[Path], tmp_path: Path
) -> None:
    """--check-weight-update-equal passes for what was sent, and names a tensor that is another on the server."""
    source = fleet.source
    fleet.transport, fleet.check_equal = TRANSPORTS["tensor"](tmp_path), True
    try:
        model.load_state_dict(load(folders[1]).state_dict())
        engine.set_version(5)

        def export_another(folder: Path) -> None:
            with torch.no_grad():
                model.model.norm.weight[3] += 0.01
            source.export(folder)

        fleet.source = replace(source, export=export_another)
        with pytest.raises(RolloutError, match=r"'model.norm.weight .*1 of \d+ tensors"):
            engine.set_version(6)
    finally:
        fleet.source, fleet.check_equal = source, False
        model.load_state_dict(load(folders[0]).state_dict())
        for server in fleet.servers:
            server.api.resume()
        engine.set_version(7)
