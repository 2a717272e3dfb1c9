"""A run before its weights are there: config.json, a tokenizer and `--load-format dummy`."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from e2e_runs import Workshop, read_metrics, run


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_without_weights_samples_and_trains(workshop: Workshop, tmp_path: Path, processes: int) -> None:
    model = tmp_path / "model"
    shutil.copytree(workshop.model, model, ignore=shutil.ignore_patterns("*.safetensors*"))
    without = replace(workshop, model=model)
    options = {"num_rollout": 2, "load_format": "dummy", "logprob_diff_limit": 1e-4}
    run(*without.train(tmp_path / "run", **options, actor_num_gpus_per_node=processes))
    steps = [row for row in read_metrics(tmp_path / "run") if "train/loss" in row]
    assert len(steps) == 2
    assert all(0 < row["train/grad_norm"] < 100 for row in steps)
