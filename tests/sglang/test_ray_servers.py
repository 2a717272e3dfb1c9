"""Servers that a run starts on the nodes of a Ray cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from real_servers import PYTHON, START_S, server_options
from test_arguments import PARSE

from lockstep.cluster.ray_servers import server_parts
from lockstep.config.parsing import parse_options
from lockstep.rollout.sglang.arguments import spanning_words
from lockstep.rollout.sglang.open import _plan
from lockstep.rollout.sglang.process import LocalServers

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "ray"))
from ray_nodes import ENV, RayNodes  # noqa: E402

STAND_IN = """
import pathlib, sys, time
if "--help" in sys.argv:
    print("--model-path --dtype --tp-size")
else:
    print(" ".join(sys.argv[-6:]), flush=True)
    has_begun = pathlib.Path(__file__).with_name("first")
    if sys.argv[sys.argv.index("--node-rank") + 1] == "0":
        has_begun.touch()
    elif {ends}:
        while not has_begun.exists():
            time.sleep(0.1)
        sys.exit(3)
    time.sleep(600)
"""
"""In place of `sglang.launch_server`: says how it was called, and its second process may end."""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    """Of one CPU each."""
    nodes = RayNodes(tmp_path_factory.mktemp("ray") / "log")
    for address in ("127.0.0.2", "127.0.0.3", "127.0.0.4"):
        nodes.add(address)
    yield nodes
    nodes.close()


def on_nodes(nodes: RayNodes, **changes: Any) -> dict[str, Any]:
    return {"ray_address": nodes.address, "device": "cpu", "rollout_num_gpus": 1} | changes


def test_a_server_on_a_node_gets_every_version_and_agrees_with_the_trainer(
    nodes: RayNodes, workshop: Any, runs: ModuleType, tmp_path: Path
) -> None:
    """Both are fp32: they differ by the order of sums. It compares what it was sent with an export, bit for bit."""
    options = server_options() | on_nodes(nodes, check_weight_update_equal=True)
    done = runs.finish(runs.start(*workshop.train(tmp_path, **options), env=ENV), timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [row for row in runs.read_metrics(tmp_path) if row["step"] >= 0]
    assert len(rows) == 2
    for row in rows:
        assert 0 < row["train/train_rollout_logprob_abs_diff"] < 1e-5
        assert row["train/grad_norm"] > 0
    log = (tmp_path / "sglang" / "server-0.log").read_text()
    assert any(f"Uvicorn running on http://{address}:" in log for address in nodes.raylets)
    assert log.count('"POST /update_weights_from_distributed HTTP/1.1" 200') == 2
    assert_no_server_of(tmp_path)


def spanning(nodes: RayNodes, root: Path, *, ends: bool) -> dict[str, Any]:
    """Options for a stand-in that has a process on each of two nodes."""
    (root / "sglang").mkdir()
    (root / "sglang" / "launch_server.py").write_text(STAND_IN.format(ends=ends))
    python = root / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={root} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    engine = {"rollout_engine": "sglang", "sglang_python": python, "rollout_server_start_timeout": START_S}
    return engine | on_nodes(nodes, rollout_num_gpus=2, rollout_num_gpus_per_engine=2)


def test_a_server_over_two_nodes_is_told_its_parts_and_ends_with_any_of_them(
    nodes: RayNodes, workshop: Any, runs: ModuleType, tmp_path: Path
) -> None:
    words = workshop.train(tmp_path / "run", **spanning(nodes, tmp_path, ends=True))
    done = runs.run(*words, env=ENV, code=1)
    error = done.stderr[done.stderr.index("lockstep: error: SGLang server http://127.0.0.") :]
    url, first, second = parts_of(error)
    assert f"on node {second} it ended with exit code 3." in error
    assert url.startswith(f"http://{first}:")
    assert first != second
    assert {first, second} < set(nodes.raylets)
    assert_no_server_of(tmp_path)


def parts_of(error: str) -> tuple[str, str, str]:
    """Address of the server, and of its nodes by what their processes have said."""
    lines = error.splitlines()
    said: dict[str, tuple[str, list[str]]] = {}
    for above, line in pairwise(lines):
        if "--node-rank" in line:
            said[line.split()[3]] = (above.removeprefix("    on ").rstrip(":"), line.split())
    assert [words[:5] for _, words in said.values()] == [
        ["--nnodes", "2", "--node-rank", rank, "--dist-init-addr"] for rank in ("0", "1")
    ]
    assert said["0"][1][5] == said["1"][1][5]
    assert said["0"][1][5].startswith(f"{said['0'][0]}:")
    return lines[0].split()[4], said["0"][0], said["1"][0]


def test_servers_on_nodes_end_with_a_controller_that_is_killed(
    nodes: RayNodes, workshop: Any, runs: ModuleType, tmp_path: Path
) -> None:
    options = spanning(nodes, tmp_path, ends=False)
    process = runs.start(*workshop.train(tmp_path / "run", **options), env=ENV)
    while len(servers_of(tmp_path)) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert_no_server_of(tmp_path)


def servers_of(root: Path) -> list[int]:
    """Processes of servers whose model, Python or log is below this folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        words = " ".join(process.info["cmdline"] or [])
        here = str(root) in words or str(root) == (process.info["environ"] or {}).get("PYTHONPATH")
        if here and "sglang.launch_server" in words and process.is_running():
            found.append(process.pid)
    return found


def assert_no_server_of(root: Path) -> None:
    deadline = time.monotonic() + 60
    while servers_of(root):
        assert time.monotonic() < deadline, f"servers {servers_of(root)} outlived their run"
        time.sleep(0.1)


def test_a_server_that_would_have_parts_of_nodes_is_refused(workshop: Any, runs: ModuleType, tmp_path: Path) -> None:
    changes = {"actor_num_nodes": 2, "actor_num_gpus_per_node": 3, "rollout_num_gpus_per_engine": 2}
    options = {"rollout_engine": "sglang", "sglang_python": PYTHON, "rollout_batch_size": 6} | changes
    done = runs.run(*workshop.train(tmp_path, **options), code=2)
    assert "--rollout-num-gpus-per-engine is 2: a server of this size would have parts of nodes" in done.stderr
    assert "Use a divisor or a multiple of 3." in done.stderr


@pytest.mark.parametrize(
    ("number", "gpus_per_server", "gpus_per_node", "parts"),
    [
        (0, 24, 8, [(0, range(8)), (1, range(8)), (2, range(8))]),
        (1, 16, 8, [(2, range(8)), (3, range(8))]),
        (3, 8, 8, [(3, range(8))]),
        (3, 4, 8, [(1, range(4, 8))]),
        (1, 2, 2, [(1, range(2))]),
    ],
)
def test_gpus_are_counted_through_the_nodes(
    number: int, gpus_per_server: int, gpus_per_node: int, parts: list[tuple[int, range]]
) -> None:
    assert server_parts(number, gpus_per_server, gpus_per_node) == parts


def test_the_recipe_on_three_nodes_starts_one_server_with_these_command_lines() -> None:
    recipe = str(ROOT / "recipes" / "qwen3-30b-a3b-3x8gpu" / "recipe.toml")
    config = parse_options("train", [recipe, "--sglang-python", str(PYTHON)]).config
    plan = _plan(config, LocalServers(24, 0), returns_routes=False, releases_memory=True)
    assert plan.num_servers == 1
    lines = [[*plan.words, *spanning_words(rank, 3, "10.0.0.1:40000")] for rank in range(3)]
    common = (
        "--dtype bfloat16 --mem-fraction-static 0.5 --ep-size 24 --enable-dp-attention --dp-size 3 "
        "--moe-dense-tp-size 1 --enable-dp-lm-head --ep-num-redundant-experts 16 --enable-memory-saver --tp-size 24 "
    )
    assert [" ".join(line) for line in lines] == [
        common + f"--nnodes 3 --node-rank {rank} --dist-init-addr 10.0.0.1:40000" for rank in range(3)
    ]
    done = subprocess.run(
        [str(PYTHON), "-c", PARSE], input=json.dumps(lines), capture_output=True, text=True, check=True, timeout=300
    )
    parsed = [json.loads(line.removeprefix("PARSED ")) for line in done.stdout.splitlines() if "PARSED" in line]
    assert [(p["nnodes"], p["node_rank"], p["dist_init_addr"], p["tp_size"]) for p in parsed] == [
        (3, rank, "10.0.0.1:40000", 24) for rank in range(3)
    ]
