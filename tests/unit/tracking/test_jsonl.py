"""metrics.jsonl holds each finished step once, whatever interrupts the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.errors import DataError, RolloutError
from lockstep.tracking import JsonlTracker
from lockstep.tracking.jsonl import read_steps


def rows_in(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_each_step_is_one_object_with_the_metrics_as_given(tmp_path):
    tracker = JsonlTracker(tmp_path / "new" / "run")
    tracker.log(-1, {"eval/sums": 0.25})
    tracker.log(0, {"train/loss": 0.1 + 0.2, "train/step": 1})
    tracker.close()
    assert rows_in(tmp_path / "new" / "run") == [
        {"step": -1, "eval/sums": 0.25},
        {"step": 0, "train/loss": 0.30000000000000004, "train/step": 1},
    ]


def test_scalars_of_numpy_and_torch_are_plain_numbers_and_what_is_not_finite_is_null(tmp_path):
    JsonlTracker(tmp_path).log(
        0,
        {
            "a": np.float32(0.5),
            "b": torch.tensor(2),
            "c": float("nan"),
            "d": float("-inf"),
            "e": np.int64(3),
            "f": True,
        },
    )
    assert rows_in(tmp_path) == [{"step": 0, "a": 0.5, "b": 2, "c": None, "d": None, "e": 3, "f": 1}]


@pytest.mark.parametrize("value", ["high", [1.0, 2.0], None, torch.zeros(2), np.zeros(2)])
def test_a_metric_that_is_not_one_number_is_refused_by_name(tmp_path, value):
    with pytest.raises(RolloutError, match=r"metric my_hook/x is .*: A metric is one number"):
        JsonlTracker(tmp_path).log(0, {"my_hook/x": value})


def test_a_step_cannot_be_logged_twice(tmp_path):
    JsonlTracker(tmp_path).log(4, {})
    tracker = JsonlTracker(tmp_path)
    with pytest.raises(AssertionError, match="step 4 after step 4"):
        tracker.log(4, {})


def test_a_resumed_run_replaces_the_steps_after_its_checkpoint(tmp_path):
    first = JsonlTracker(tmp_path)
    for step in range(5):
        first.log(step, {"train/loss": float(step)})
    resumed = JsonlTracker(tmp_path)
    resumed.truncate_after(2)
    resumed.log(3, {"train/loss": 30.0})
    assert [(row["step"], row["train/loss"]) for row in rows_in(tmp_path)] == [(0, 0), (1, 1), (2, 2), (3, 30)]


def test_truncating_after_nothing_starts_over(tmp_path):
    tracker = JsonlTracker(tmp_path)
    tracker.log(7, {})
    tracker.truncate_after(None)
    tracker.log(0, {})
    assert [row["step"] for row in rows_in(tmp_path)] == [0]


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(min_value=0, max_value=200), keep=st.integers(min_value=-1, max_value=6))
def test_a_file_cut_anywhere_keeps_its_complete_lines_and_goes_on(tmp_path_factory, cut, keep):
    run_dir = tmp_path_factory.mktemp("run")
    whole = JsonlTracker(run_dir)
    for step in range(6):
        whole.log(step, {"train/loss": step / 7})
    whole.close()
    content = whole.path.read_bytes()
    whole.path.write_bytes(content[: max(0, len(content) - cut)])
    complete = whole.path.read_bytes().count(b"\n")

    resumed = JsonlTracker(run_dir)
    resumed.truncate_after(keep)
    resumed.log(keep + 1, {"train/loss": 1.0})
    resumed.close()
    expected = [step for step in range(complete) if step <= keep]
    assert [row["step"] for row in rows_in(run_dir)] == [*expected, keep + 1]
    assert all(row["train/loss"] == row["step"] / 7 for row in rows_in(run_dir)[:-1])


def test_a_half_written_line_is_not_glued_to_the_next_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "train/lo')
    JsonlTracker(tmp_path).log(1, {"train/loss": 0.5})
    assert rows_in(tmp_path) == [{"step": 0}, {"step": 1, "train/loss": 0.5}]


def test_what_was_logged_outlives_a_sigkill(tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path; from lockstep.tracking.jsonl import JsonlTracker\n"
        "tracker = JsonlTracker(Path(sys.argv[1]))\n"
        "for step in range(3): tracker.log(step, {'train/loss': step / 3})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env={**os.environ}, check=False)
    assert run.returncode == -signal.SIGKILL
    assert rows_in(tmp_path) == [{"step": step, "train/loss": step / 3} for step in range(3)]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"loss": 1}\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl:2 is .*whole-number step"):
        read_steps(path)


def test_no_file_is_no_steps(tmp_path):
    assert read_steps(tmp_path / "metrics.jsonl") == []
