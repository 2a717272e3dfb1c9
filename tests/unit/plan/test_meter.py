"""Peaks are those of the phase that is measured, beside what was predicted for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from plan_cases import GRPO, SHAPES, config

from lockstep import metrics
from lockstep.models import read_model_config
from lockstep.plan import Hardware, Prediction, predict
from lockstep.plan.hardware import GIB
from lockstep.plan.meter import NoMeter, ProcessMeter

FORGETS = Path("/proc/self/clear_refs").exists()


@pytest.fixture
def prediction() -> Prediction:
    return predict(config(GRPO, use_kl_loss=True), read_model_config(SHAPES["4B"]), Hardware.parse("256G-host"))


def measured(meter: ProcessMeter, phase: str, num_bytes: int) -> float:
    """GiB at the peak of a phase that takes this much and gives it back."""
    meter.start()
    np.ones(num_bytes, dtype=np.uint8)
    meter.stop(phase)
    return meter.take()[f"perf/memory_host/{phase}"]


@pytest.mark.skipif(not FORGETS, reason="the system measures one peak for the whole life of a process")
def test_a_phase_does_not_see_the_peak_of_the_one_before(prediction: Prediction) -> None:
    meter = ProcessMeter(prediction, torch.device("cpu"))
    small = measured(meter, "rollout", 2**20)
    large = measured(meter, "train", 2**28)
    again = measured(meter, "save", 2**20)
    assert large - small == pytest.approx(0.25, abs=0.03), "256 MiB; other threads may take some"
    assert again == pytest.approx(small, abs=0.03)


def test_metrics_are_declared_and_hold_the_prediction(prediction: Prediction) -> None:
    meter = ProcessMeter(prediction, torch.device("cpu"))
    for phase in ("load", "rollout", "log_probs", "train", "save"):
        meter.start()
        meter.stop(phase)
    found = meter.take()
    metrics.check(found)
    largest = max(prediction.phase("backward").host_bytes, prediction.phase("optimizer").host_bytes)
    assert found["perf/memory_host_predicted/train"] == largest / GIB
    assert found["perf/memory_host_predicted/log_probs"] == prediction.phase("log-probs").host_bytes / GIB
    assert meter.take() == {}, "taken once"


def test_the_summary_has_the_highest_peak_of_all_steps(prediction: Prediction) -> None:
    meter = ProcessMeter(prediction, torch.device("cpu"))
    peaks = [measured(meter, "train", size) for size in (2**28, 2**20)]
    (line,) = meter.summary()
    predicted = prediction.phase("backward").host_bytes / GIB
    assert line == f"host memory, highest GiB (predicted): train {max(peaks):.3g} ({predicted:.3g})"


def test_where_nothing_is_measured_nothing_is_said() -> None:
    meter = NoMeter()
    meter.start()
    meter.stop("train")
    assert meter.take() == {}
    assert list(meter.summary()) == []


def test_a_peak_for_which_nothing_was_predicted_stands_alone() -> None:
    """As of sampling, where SGLang's servers do it."""
    prediction = predict(config(GRPO), read_model_config(SHAPES["4B"]), Hardware.parse("256G-host"), samples=False)
    meter = ProcessMeter(prediction, torch.device("cpu"))
    peak = measured(meter, "rollout", 2**20)
    assert list(meter.summary()) == [f"host memory, highest GiB (predicted): rollout {peak:.3g}"]
