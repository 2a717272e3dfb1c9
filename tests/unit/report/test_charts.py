"""Charts draw what metrics.jsonl says, and nothing where it says nothing."""

from __future__ import annotations

import pytest

from lockstep import metrics
from lockstep.report import charts
from lockstep.report.charts import HEALTH, LEARNING, SPEED, Line


def spec(title):
    return next(each for each in LEARNING + HEALTH + SPEED if each.title == title)


def test_every_metric_of_every_chart_is_declared():
    names = {name for each in LEARNING + HEALTH + SPEED for name, _ in each.metrics} | {
        name for _, name in charts.PHASES
    }
    declared = {metric.name for metric in metrics.METRICS}
    assert [name for name in names if name not in declared and metrics.find(name) is None] == []


def test_lines_hold_the_steps_that_logged_the_metric():
    rows = [
        {"step": -1, "eval/sums": 0.25},
        {"step": 0, "eval/step": 0},
        {"step": 1, "eval/sums": 0.5, "eval/x-pass@2": 1.0},
    ]
    chart = charts.build(spec("Held-out evaluation"), rows)
    assert chart.lines == [Line("sums", [-1, 1], [0.25, 0.5])]


def test_a_chart_without_any_of_its_metrics_is_left_out():
    assert charts.build(spec("KL"), [{"step": 0, "train/loss": 1.0}]) is None
    assert charts.build(spec("Loss"), [{"step": 0, "train/loss": None}]) is None


def test_exact_agreement_has_no_place_on_a_log_axis():
    rows = [
        {"step": 0, "train/train_rollout_logprob_abs_diff": 0.0},
        {"step": 1, "train/train_rollout_logprob_abs_diff": 1e-7},
    ]
    assert charts.build(spec("Sampler against trainer"), rows).lines == [Line("mean", [0, 1], [None, 1e-7])]


def test_stacks_have_a_value_at_every_step():
    rows = [
        {"step": -1},
        {"step": 0, "rollout/zero_std/count_1.0": 2.0},
        {"step": 1, "rollout/zero_std/count_0.0": 3.0},
    ]
    assert charts.build(spec("Groups without a signal"), rows).lines == [
        Line("0.0", [0, 1], [0.0, 3.0]),
        Line("1.0", [0, 1], [2.0, 0.0]),
    ]


def test_a_long_noisy_line_stands_behind_its_running_mean():
    rows = [{"step": step, "rollout/raw_reward": float(step)} for step in range(48)]
    raw, mean = charts.build(spec("Reward"), rows).lines
    assert raw.is_faint
    assert raw.y == [float(step) for step in range(48)]
    assert mean.name == "mean of 4 steps"
    assert mean.y[:4] == [0.0, 0.5, 1.0, 1.5]
    assert mean.y[47] == (44 + 45 + 46 + 47) / 4
    assert len(charts.build(spec("Reward"), rows[:10]).lines) == 1


def test_the_phases_of_a_step_add_up_to_its_time():
    rows = [
        {"step": -1, "eval/sums": 0.1},
        {
            "step": 0,
            "perf/step_time": 10.0,
            "perf/rollout_time": 6.0,
            "perf/actor_train_time": 3.0,
        },
        {"step": 1, "perf/step_time": 8.0, "perf/rollout_time": 5.0, "perf/actor_train_time": 3.0},
    ]
    chart = charts.phase_times(rows)
    assert {line.name: line.y for line in chart.lines} == {
        "sampling and rewards": [6.0, 5.0],
        "update": [3.0, 3.0],
        "other": [1.0, 0.0],
    }
    for position, step_time in enumerate([10.0, 8.0]):
        assert sum(line.y[position] for line in chart.lines) == pytest.approx(step_time)


def test_a_run_without_times_has_no_phase_chart():
    assert charts.phase_times([{"step": 0, "train/loss": 1.0}]) is None
