"""Servers that die, hang or talk nonsense in mid-rollout: every request is answered once, under the current weights."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import psutil
import pytest
from real_servers import CPU_ARGS, PYTHON, START_S, engine_of, load, score, start_fleet

from lockstep.models import LanguageModel
from lockstep.rollout.engine import Generation, SamplingParams
from lockstep.rollout.sglang import SGLangEngine
from lockstep.rollout.sglang.api import ServerApi
from lockstep.rollout.sglang.arguments import server_words
from lockstep.rollout.sglang.fleet import ServerFleet
from lockstep.weight_sync import TensorTransport

PROMPTS = [[5 + i, 6, 7, 8, 9 + i] for i in range(24)]
"""Three times what the server runs at once."""
LENGTH = 100
CLOSE = 1e-4


@pytest.fixture(scope="module")
def fleet(folders: list[Path], model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFleet]:
    """A server with weights that were trained since it began: version 3 is not what it would load by itself."""
    transport = TensorTransport(bucket_bytes=2**20, tp_size=1, timeout_s=120)
    fleet = start_fleet(folders[0], model, transport, tmp_path_factory.mktemp("fleet"))
    try:
        fleet.wait_until_ready()
        model.load_state_dict(load(folders[1]).state_dict())
        fleet.publish(3)
        yield fleet
    finally:
        fleet.close()


def rollout_with(engine: SGLangEngine, fault: object) -> list[Generation]:
    """Sample all prompts; `fault` happens once the server has begun to answer."""

    async def run() -> list[Generation]:
        answered = asyncio.Event()

        async def one(number: int) -> Generation:
            params = SamplingParams(max_new_tokens=LENGTH)
            try:
                return await engine.generate(PROMPTS[number], params, (0, 0, number, number))
            finally:
                answered.set()

        tasks = [asyncio.create_task(one(number)) for number in range(len(PROMPTS))]
        await answered.wait()
        fault()  # type: ignore[operator]
        generations = list(await asyncio.gather(*tasks))
        await engine.drain()
        return generations

    return asyncio.run(asyncio.wait_for(run(), START_S))


def assert_each_is_answered_under_version_3(model: LanguageModel, generations: list[Generation]) -> None:
    assert len(generations) == len(PROMPTS)
    for prompt, generation in zip(PROMPTS, generations, strict=True):
        expected, _ = score(model, prompt, generation.token_ids)
        assert generation.log_probs == pytest.approx(expected.tolist(), abs=CLOSE)
        assert generation.weight_versions == ["3"] * len(generation.token_ids)
        assert len(generation.token_ids) == LENGTH or generation.finish_reason == "stop"


def processes_of(fleet: ServerFleet) -> list[psutil.Process]:
    (member,) = fleet._members.values()
    assert member.process is not None
    process = psutil.Process(member.process.process.pid)
    return [process, *process.children(recursive=True)]


def test_a_killed_server_comes_back_with_the_current_weights_and_nothing_is_lost(
    fleet: ServerFleet, model: LanguageModel
) -> None:
    engine = engine_of(fleet)
    before = processes_of(fleet)
    generations = rollout_with(engine, lambda: os.kill(before[0].pid, signal.SIGKILL))
    assert_each_is_answered_under_version_3(model, generations)
    assert engine.num_lost == 1
    assert 0 < engine.num_resent < len(PROMPTS)
    psutil.wait_procs(before, timeout=10)
    assert [process for process in before if process.is_running() and process.status() != "zombie"] == []


def test_a_server_that_ended_between_rollouts_is_back_for_the_next_one(
    fleet: ServerFleet, model: LanguageModel
) -> None:
    engine = engine_of(fleet)
    before = processes_of(fleet)
    os.kill(before[0].pid, signal.SIGKILL)
    psutil.wait_procs(before[:1], timeout=10)
    engine.set_version(3)
    generations = rollout_with(engine, lambda: None)
    assert_each_is_answered_under_version_3(model, generations)
    assert (engine.num_lost, engine.num_resent) == (0, 0)


def test_a_hung_server_is_found_by_its_health_and_replaced(fleet: ServerFleet, model: LanguageModel) -> None:
    engine = engine_of(fleet, health_interval_s=5.0, health_timeout_s=30.0)
    engine.set_version(3)
    before = processes_of(fleet)
    generations = rollout_with(engine, lambda: [process.suspend() for process in before])
    assert_each_is_answered_under_version_3(model, generations)
    assert engine.num_lost == 1
    psutil.wait_procs(before, timeout=10)
    assert [process for process in before if process.is_running() and process.status() != "zombie"] == []


def test_a_server_that_hangs_when_new_weights_come_is_started_again_with_them(
    fleet: ServerFleet, model: LanguageModel
) -> None:
    engine = engine_of(fleet)
    before = processes_of(fleet)
    for process in before:
        process.suspend()
    patience, fleet.health_timeout_s = fleet.health_timeout_s, 5.0
    try:
        engine.set_version(3)
    finally:
        fleet.health_timeout_s = patience
    assert_each_is_answered_under_version_3(model, rollout_with(engine, lambda: None))
    assert engine.num_resent == 0
    psutil.wait_procs(before, timeout=10)
    assert [process for process in before if process.is_running() and process.status() != "zombie"] == []


STARTS_A_SERVER = """
import os, sys, time
from pathlib import Path
from lockstep.rollout.sglang.process import ServerProcess
python, model, log, *words = sys.argv[1:]
server = ServerProcess(python, words, model=Path(model), version="0", environment=os.environ, log=Path(log))
print(server.process.pid, flush=True)
time.sleep(600)
"""


def test_a_server_that_has_just_begun_ends_with_a_lockstep_that_is_killed(folders: list[Path], tmp_path: Path) -> None:
    """Its processes are there, and have not imported what would end them with their parent."""
    words = [PYTHON, folders[0], tmp_path / "log", *server_words(CPU_ARGS, tp_size=1)]
    lockstep = subprocess.Popen([sys.executable, "-c", STARTS_A_SERVER, *map(str, words)], stdout=subprocess.PIPE)
    assert lockstep.stdout is not None
    server = psutil.Process(int(lockstep.stdout.readline()))
    deadline = time.monotonic() + START_S
    while len(born := [p for p in server.children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]) < 2:
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-2000:]
        time.sleep(0.02)
    everybody = [server, *server.children(recursive=True)]
    lockstep.kill()
    lockstep.communicate()
    _, alive = psutil.wait_procs(everybody, timeout=10)
    assert [p for p in alive if p.status() != "zombie"] == [], born


def test_a_server_that_answers_garbage_is_replaced(fleet: ServerFleet, model: LanguageModel) -> None:
    """Something else answers at the server's address: it is alive, says 200, and knows nothing."""

    class Impostor(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(b'{"text": "", "meta_info": {"finish_reason": {"type": "stop"}}}')

        def log_message(self, *_: object) -> None:
            pass

    engine = engine_of(fleet)
    engine.set_version(3)
    impostor = ThreadingHTTPServer(("127.0.0.1", 0), Impostor)
    thread = Thread(target=impostor.serve_forever)
    thread.start()
    try:
        fleet.servers[0].api = ServerApi(f"http://127.0.0.1:{impostor.server_port}")
        generations = rollout_with(engine, lambda: None)
    finally:
        impostor.shutdown()
        thread.join()
        impostor.server_close()
    assert_each_is_answered_under_version_3(model, generations)
    assert engine.num_lost == 1
