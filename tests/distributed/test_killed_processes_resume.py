"""A run over two processes that loses a rank or its controller, and is resumed, is the run that lost nobody."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from e2e_runs import (
    Workshop,
    assert_nobody_lives,
    assert_same_checkpoint,
    finish,
    hook,
    make_workshop,
    read_metrics,
    run,
    start,
)

from lockstep.checkpoint.training import list_checkpoints

NUM_ROLLOUT = 6
LAST = f"checkpoints/rollout_{NUM_ROLLOUT - 1:07d}"


def words(workshop: Workshop, root: Path) -> list[str]:
    """Everything that a resumed run could get wrong: a filter, a moving reference, replayed routes, 8-bit moments."""
    options: dict[str, Any] = {
        "actor_num_gpus_per_node": 2,
        "expert_model_parallel_size": 2,
        "params_dtype": "bfloat16",
        "use_precision_aware_optimizer": True,
        "exp_avg_dtype": "8bit",
        "exp_avg_sq_dtype": "8bit",
        "save": root / "checkpoints",
        "load": root / "checkpoints",
        "save_interval": 2,
        "num_rollout": NUM_ROLLOUT,
        "num_steps_per_rollout": 2,
        "lr_decay_style": "cosine",
        "dynamic_sampling_filter_path": hook("two_of_three"),
        "rollout_sample_hook_path": hook("at_sample"),
        "rollout_data_postprocess_path": hook("shake_advantages"),
        "use_kl_loss": True,
        "kl_loss_coef": 0.1,
        "ref_update_interval": 2,
        "use_rollout_routing_replay": True,
        "logprob_diff_limit": None,
    }
    return workshop.train(root, **options)


def environment(root: Path, moment: str = "") -> dict[str, str]:
    return {"E2E_TOKEN": str(root), "E2E_MOMENT": moment and f"SIGKILL {moment}"}


def whole_run(workshop: Workshop, root: Path) -> Path:
    run(*words(workshop, root), env=environment(root))
    return root


def kill_controller(workshop: Workshop, root: Path, moment: str) -> None:
    run(*words(workshop, root), env=environment(root, moment), code=-9)


def kill_rank(workshop: Workshop, root: Path, rank: int, is_time: Callable[[], bool]) -> None:
    process = start(*words(workshop, root), env=environment(root))
    while not is_time():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    ranks = [p for p in psutil.Process(process.pid).children() if "lockstep.cluster.worker" in " ".join(p.cmdline())]
    ranks[rank].kill()
    done = finish(process)
    assert done.returncode == 1
    assert f"rank {rank} is 'killed by SIGKILL'" in done.stderr


def run_without_a_rank(workshop: Workshop, root: Path) -> Path:
    """One is killed soon after a step was logged, the other while a checkpoint is written."""
    metrics, unfinished = root / "metrics.jsonl", root / "checkpoints" / "rollout_0000003.incomplete"
    kill_rank(workshop, root, 1, lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 3)
    assert_nobody_lives(str(root))
    kill_rank(workshop, root, 0, unfinished.exists)
    assert_nobody_lives(str(root))
    assert newest(root) == "rollout_0000001"
    return whole_run(workshop, root)


def run_without_a_controller(workshop: Workshop, root: Path) -> Path:
    for moment, checkpoint in (("train 2", "1"), ("save:json rollout_0000003", "1"), ("rollout 4", "3")):
        kill_controller(workshop, root, moment)
        assert_nobody_lives(str(root))
        assert newest(root) == f"rollout_000000{checkpoint}", moment
    return whole_run(workshop, root)


def newest(root: Path) -> str:
    return list_checkpoints(root / "checkpoints")[-1].name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[Path]]:
    """All runs of this file, two at a time."""
    workshop = make_workshop(tmp_path_factory.mktemp("workshop"))
    root = tmp_path_factory.mktemp("killed")
    with ThreadPoolExecutor(2) as pool:
        return {
            run.__name__: pool.submit(run, workshop, root / run.__name__)
            for run in (run_without_a_controller, run_without_a_rank, whole_run)
        }


@pytest.mark.parametrize("name", ["run_without_a_rank", "run_without_a_controller"])
def test_a_run_that_lost_a_process_is_the_run_that_lost_none(runs: dict[str, Future[Path]], name: str) -> None:
    """Bit for bit: metrics of every step, weights, state, counters. No process outlives any of them."""
    whole, killed = runs["whole_run"].result(), runs[name].result()
    expected = read_metrics(whole)
    assert [row["step"] for row in expected] == list(range(NUM_ROLLOUT))
    assert len({row["train/lr-pg_0"] for row in expected}) == NUM_ROLLOUT
    assert read_metrics(killed) == expected
    assert_same_checkpoint(killed / LAST, whole / LAST)
