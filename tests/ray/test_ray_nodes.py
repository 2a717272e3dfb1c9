"""`lockstep train` on a real Ray cluster of several nodes: what it computes, and what a lost node does to it."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from e2e_runs import Workshop, assert_nobody_lives, assert_same_checkpoint, finish, flags, read_metrics, run, start
from ray_nodes import ENV, RayNodes

NUM_ROLLOUT = 3


def words(workshop: Workshop, root: Path, **changes: Any) -> list[str]:
    options = {
        "num_rollout": NUM_ROLLOUT,
        "save": root / "checkpoints",
        "load": root / "checkpoints",
        "save_interval": 1,
        "device": "cpu",
        "eval_interval": 2,
        "skip_eval_before_train": True,
        "logprob_diff_limit": 1e-4,
        "distributed_timeout_minutes": 2,
    }
    return [
        *workshop.train(root, **options | changes),
        *flags({"eval_prompt_data": ["heldout", workshop.heldout]}),
    ]


def on_nodes(nodes: RayNodes, **changes: Any) -> dict[str, Any]:
    return {"actor_num_nodes": 2, "ray_address": nodes.address} | changes


@pytest.fixture(scope="module")
def local(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run as two processes of this machine, without Ray."""
    root = tmp_path_factory.mktemp("local")
    run(*words(workshop, root, actor_num_gpus_per_node=2))
    return root


def test_two_nodes_train_as_two_local_processes_do(
    workshop: Workshop, nodes: RayNodes, local: Path, tmp_path: Path
) -> None:
    """The same ranks do the same work: bit for bit, checkpoints included."""
    done = run(*words(workshop, tmp_path, **on_nodes(nodes)), env=ENV)
    assert "2 processes on cpu: dp2" in done.stderr
    assert read_metrics(tmp_path) == read_metrics(local)
    last = f"checkpoints/rollout_{NUM_ROLLOUT - 1:07d}"
    assert_same_checkpoint(tmp_path / last, local / last)
    assert psutil.pid_exists(nodes.raylets["127.0.0.2"]), "the cluster was not the run's to end"


def test_a_lost_node_is_named_and_the_run_resumes_without_it(
    workshop: Workshop, nodes: RayNodes, local: Path, tmp_path: Path
) -> None:
    """One node samples and one trains: the one that dies is replaced by a new one with another address."""
    nodes.add("127.0.0.4")
    token = str(tmp_path)
    process = start(*words(workshop, tmp_path, **on_nodes(nodes, num_rollout=1000)), env=ENV | {"E2E_TOKEN": token})
    first = tmp_path / "checkpoints" / "rollout_0000000"
    while not first.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    ranks = workers_by_raylet(nodes)
    used = [address for address, workers in ranks.items() if workers]
    assert len(used) == 2
    os.kill(nodes.raylets[used[1]], signal.SIGKILL)
    done = finish(process, timeout=90)
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("lockstep: error:")]
    assert f"({used[1]}) is 'lost with its node': it was " in error
    assert error.startswith("lockstep: error: rank ")
    assert "--load" in error
    assert_nobody_lives(token)

    for later in (tmp_path / "checkpoints").glob("rollout_*"):
        if later != first:
            shutil.rmtree(later)
    run(*words(workshop, tmp_path, **on_nodes(nodes)), env=ENV)
    assert read_metrics(tmp_path) == read_metrics(local)
    last = f"checkpoints/rollout_{NUM_ROLLOUT - 1:07d}"
    assert_same_checkpoint(tmp_path / last, local / last)


def workers_by_raylet(nodes: RayNodes) -> dict[str, list[int]]:
    """Processes of ranks below every raylet."""
    found = {}
    for address, pid in nodes.raylets.items():
        below = psutil.Process(pid).children(recursive=True)
        found[address] = [p.pid for p in below if "lockstep.cluster.worker" in " ".join(p.cmdline())]
    return found


def test_replicas_on_other_nodes_sample_one_step_off(workshop: Workshop, nodes: RayNodes, tmp_path: Path) -> None:
    """As processes of this machine do, where the one that trains is the controller: its sums are rounded otherwise."""
    changes: dict[str, Any] = {"rollout_num_gpus": 1, "schedule": "one-step-off", "logprob_diff_limit": None}
    here, there = tmp_path / "here", tmp_path / "there"
    run(*words(workshop, here, **changes))
    run(*words(workshop, there, **changes, ray_address=nodes.address), env=ENV)
    for found, expected in zip(read_metrics(there), read_metrics(here), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    assert [row["rollout/staleness_max"] for row in read_metrics(there)] == [0, 1, 1]


def test_a_cluster_that_is_too_small_is_refused_at_once(workshop: Workshop, nodes: RayNodes, tmp_path: Path) -> None:
    options = on_nodes(nodes, actor_num_gpus_per_node=2)
    done = run(*words(workshop, tmp_path, **options), env=ENV, code=2)
    assert "--actor-num-nodes and --actor-num-gpus-per-node is '2 + 2': so many CPUs are needed" in done.stderr
    assert "127.0.0.2: 1" in done.stderr
