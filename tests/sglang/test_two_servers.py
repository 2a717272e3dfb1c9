"""Two real servers behind one engine: who is asked, weights for both at once, and one of them lost."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_servers import START_S, engine_of, load, score, source_of, start_fleet

from lockstep.models import LanguageModel
from lockstep.rollout.engine import Generation, SamplingParams
from lockstep.rollout.sglang import SGLangEngine
from lockstep.rollout.sglang.fleet import ServerFleet
from lockstep.weight_sync import BroadcastTransport, DiskTransport

PROMPTS = [[5 + i, 6, 7, 8, 9 + i] for i in range(6)]
SAMPLES = 4
CLOSE = 1e-4
"""Both sides compute in fp32; measured differences stay below 1e-5."""


@pytest.fixture(scope="module")
def fleet(folders: list[Path], model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFleet]:
    """Both have version 1, which they were sent together."""
    transport = BroadcastTransport(backend="gloo", bucket_bytes=2**16, tp_size=1, host="127.0.0.1", timeout_s=120)
    work = tmp_path_factory.mktemp("fleet")
    fleet = start_fleet(folders[0], model, transport, work, num_servers=2)
    try:
        fleet.wait_until_ready()
        model.load_state_dict(load(folders[1]).state_dict())
        fleet.publish(1)
        yield fleet
    finally:
        fleet.close()


def sampled_groups(engine: SGLangEngine, fault: object = None) -> list[Generation]:
    """`SAMPLES` of every prompt; `fault` happens once the servers have begun to answer."""

    async def run() -> list[Generation]:
        answered = asyncio.Event()

        async def one(group: int, number: int) -> Generation:
            try:
                return await engine.generate(
                    PROMPTS[group], SamplingParams(max_new_tokens=80), (0, 0, group, SAMPLES * group + number)
                )
            finally:
                answered.set()

        tasks = [asyncio.create_task(one(g, number)) for g in range(len(PROMPTS)) for number in range(SAMPLES)]
        await answered.wait()
        if fault is not None:
            fault()  # type: ignore[operator]
        generations = list(await asyncio.gather(*tasks))
        await engine.drain()
        return generations

    return asyncio.run(asyncio.wait_for(run(), START_S))


def assert_all_under_version_1(model: LanguageModel, generations: list[Generation]) -> None:
    assert len(generations) == len(PROMPTS) * SAMPLES
    for number, generation in enumerate(generations):
        expected, _ = score(model, PROMPTS[number // SAMPLES], generation.token_ids)
        assert generation.log_probs == pytest.approx(expected.tolist(), abs=CLOSE)
        assert generation.weight_versions == ["1"] * len(generation.token_ids)


def requests_seen(fleet: ServerFleet) -> list[int]:
    """Requests that each server has written into its log since it was first started."""
    members = fleet._members.values()
    return [m.process.log.read_text().count('"POST /generate') for m in members if m.process is not None]


def test_a_prompts_samples_share_a_server_and_prompts_are_dealt_by_load(
    fleet: ServerFleet, model: LanguageModel
) -> None:
    engine = engine_of(fleet)
    before = requests_seen(fleet)
    assert_all_under_version_1(model, sampled_groups(engine))
    shares = [after - then for after, then in zip(requests_seen(fleet), before, strict=True)]
    half = len(PROMPTS) // 2 * SAMPLES
    assert shares == [half, half]
    groups = {group[2]: server for group, server in engine._server_of.items()}
    assert [groups[g] for g in range(len(PROMPTS))] == fleet.servers * (len(PROMPTS) // 2)


def test_two_servers_of_somebody_elses_share_the_work_and_are_left_running(
    fleet: ServerFleet, model: LanguageModel, folders: list[Path], tmp_path: Path
) -> None:
    theirs = ServerFleet(
        plan=None,
        addresses=tuple(server.api.url for server in fleet.servers),
        source=source_of(model, folders[0]),
        transport=DiskTransport(tmp_path / "disk", timeout_s=120),
        hf_folder=folders[0],
        export_folder=tmp_path / "export",
        start_timeout_s=START_S,
        check_equal=False,
    )
    theirs.wait_until_ready()
    engine = engine_of(theirs)
    engine.set_version(1)
    before = requests_seen(fleet)
    assert_all_under_version_1(model, sampled_groups(engine))
    engine.close()
    assert all(after > then for after, then in zip(requests_seen(fleet), before, strict=True))
    assert all(server.api.is_healthy(timeout_s=60) for server in fleet.servers)


def test_what_one_server_leaves_undone_the_other_does_and_the_next_update_reaches_both(
    fleet: ServerFleet, model: LanguageModel, folders: list[Path]
) -> None:
    engine = engine_of(fleet)
    lost, other = fleet.servers
    process = fleet._members[lost].process
    assert process is not None
    generations = sampled_groups(engine, lambda: os.kill(process.process.pid, signal.SIGKILL))
    assert_all_under_version_1(model, generations)
    assert engine.num_lost == 1
    assert 0 < engine.num_resent <= len(generations) // 2
    assert engine._server_of[(0, 0, 0)] is other
    assert lost.version == other.version == "1"
    fleet.publish(2)
    assert [server.api.weight_version() for server in fleet.servers] == ["2", "2"]
