"""Ctrl-C: the first ends the run with a checkpoint, the second ends it at once."""

from __future__ import annotations

import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from e2e_runs import (
    Workshop,
    assert_nobody_lives,
    assert_same_checkpoint,
    finish,
    hook,
    read_metrics,
    run,
    start,
)

from lockstep.checkpoint.training import list_checkpoints

NUM_ROLLOUT = 5
MOMENTS = [  # when the signal comes, the rollout of the newest checkpoint afterwards
    ("SIGINT eval -1", None),
    ("SIGINT rollout 0", None),
    ("SIGTERM filter 6", 0),  # the last group of rollout 1: the filter has drawn random numbers
    ("SIGINT train 1", 1),  # an evaluation is due after it
    ("SIGINT eval 3", 3),
]


def words(workshop: Workshop, root: Path, **changes: Any) -> list[str]:
    options = {
        "params_dtype": "bfloat16",
        "save": root / "checkpoints",
        "load": root / "checkpoints",
        "num_rollout": NUM_ROLLOUT,
        "rollout_sample_hook_path": hook("at_sample"),
        "dynamic_sampling_filter_path": hook("two_of_three"),
        "rollout_data_postprocess_path": hook("shake_advantages"),
        "eval_prompt_data": ["heldout", workshop.heldout],
        "eval_interval": 2,
    }
    return workshop.train(root, **options | changes)


def environment(root: Path, moment: str = "") -> dict[str, str]:
    return {"E2E_MOMENT": moment, "E2E_TOKEN": str(root), "E2E_MARKER": str(root / "marker")}


def newest(root: Path) -> str | None:
    names = [folder.name for folder in list_checkpoints(root / "checkpoints")]
    return names[-1] if names else None


def whole_run(workshop: Workshop, root: Path) -> Path:
    run(*words(workshop, root), env=environment(root))
    return root


def stopped_run(workshop: Workshop, root: Path) -> list[tuple[str, subprocess.CompletedProcess[str], str | None]]:
    """Stopped at each moment, resumed each time and finished: what each process said and left."""
    history = []
    for moment in [*(moment for moment, _ in MOMENTS), ""]:
        done = finish(start(*words(workshop, root), env=environment(root, moment)))
        assert_nobody_lives(str(root))
        history.append((moment, done, newest(root)))
    return history


@pytest.fixture(scope="module")
def runs(workshop, tmp_path_factory):
    root = tmp_path_factory.mktemp("stopping")
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(whole_run, workshop, root / "whole")
        stopped = pool.submit(stopped_run, workshop, root / "stopped")
    return whole.result(), root / "stopped", stopped.result()


def test_a_stopped_run_says_so_and_leaves_a_checkpoint_of_the_last_whole_step(runs):
    *stopped, last = runs[2]
    for (moment, done, checkpoint), (_, rollout_id) in zip(stopped, MOMENTS, strict=True):
        assert done.returncode == 130, (moment, done)
        assert "stopping: saving a checkpoint" in done.stdout, moment
        assert "Traceback" not in done.stdout + done.stderr, (moment, done.stderr)
        assert checkpoint == (None if rollout_id is None else f"rollout_{rollout_id:07d}"), (moment, done)
    assert last[1].returncode == 0, last


def test_a_stopped_and_resumed_run_is_the_run_that_went_on(runs):
    whole, root, _ = runs
    assert read_metrics(root) == read_metrics(whole)
    assert [row["step"] for row in read_metrics(root) if "eval/heldout" in row] == [-1, 1, 3, 4]
    last = f"rollout_{NUM_ROLLOUT - 1:07d}"
    assert_same_checkpoint(root / "checkpoints" / last, whole / "checkpoints" / last)


def started_and_stuck(workshop: Workshop, root: Path, **changes: Any) -> subprocess.Popen[str]:
    """A run that has reached the endless function of `changes`."""
    process = start(*words(workshop, root, eval_prompt_data=None, eval_interval=None, **changes), env=environment(root))
    deadline = time.monotonic() + 60
    while not (root / "marker").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the endless function was not reached"
        time.sleep(0.02)
    return process


def test_an_endless_reward_does_not_hold_up_a_stop(workshop, tmp_path):
    process = started_and_stuck(workshop, tmp_path, custom_rm_path=hook("endless"), reward_timeout=1000)
    before = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert finish(process).returncode == 130
    assert time.monotonic() - before < 10
    assert_nobody_lives(str(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_stops_at_once_what_cannot_be_interrupted(workshop, tmp_path, number):
    process = started_and_stuck(workshop, tmp_path, rollout_data_postprocess_path=hook("endless_postprocess"))
    process.send_signal(number)
    time.sleep(0.5)
    assert process.poll() is None
    before = time.monotonic()
    process.send_signal(number)
    done = finish(process)
    assert time.monotonic() - before < 2
    assert done.returncode == 128 + number
    assert "stopped at once" in done.stderr
    assert_nobody_lives(str(tmp_path))


def test_a_signal_that_comes_twice_at_once_is_one_request(workshop, tmp_path):
    """`timeout` and launchers signal a process and its group."""
    process = started_and_stuck(workshop, tmp_path, custom_rm_path=hook("endless"), reward_timeout=1000)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    done = finish(process)
    assert (done.returncode, done.stderr.count("stopped at once")) == (130, 0)


def test_a_stop_without_a_folder_says_that_nothing_was_saved(workshop, tmp_path):
    options = {"save": None, "load": None, "eval_prompt_data": None, "eval_interval": None}
    done = run(*words(workshop, tmp_path, **options), env=environment(tmp_path, "SIGINT rollout 1"), code=130)
    assert "nothing was saved: there is no --save" in done.stdout
    assert [row["step"] for row in read_metrics(tmp_path)] == [0]
    assert (tmp_path / "report.html").exists()


def test_ctrl_c_before_the_first_step_is_quiet(workshop, tmp_path):
    process = start(*words(workshop, tmp_path))
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.returncode in (130, -signal.SIGINT), done
