"""`lockstep plan` as a process of its own: from a recipe to a verdict, and beside what a run measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from e2e_runs import Workshop, flags, load_prepare, run

RECIPES = Path(__file__).parents[2] / "recipes" / "quickstart"


def test_the_quickstarts_recipe_fits_a_small_machine_and_not_a_tiny_one(tmp_path: Path) -> None:
    prepare = load_prepare()
    (tmp_path / "runs/quickstart/sft/hf").mkdir(parents=True)
    (tmp_path / "runs/quickstart/sft/hf/config.json").write_text(json.dumps(prepare.make_config()))
    words = ["plan", str(RECIPES / "grpo.toml"), "--hardware"]
    small = run(*words, "4G-host", cwd=tmp_path)
    assert "A rollout is 32 prompts x 8 samples = 256 samples, which make 1 step of 256." in small.stdout
    assert "It fits: " in small.stdout
    tiny = run(*words, "0.5G-host", cwd=tmp_path, code=1)
    assert "It does not fit: " in tiny.stdout
    assert sorted(path.name for path in (tmp_path / "runs/quickstart").iterdir()) == ["sft"], "a plan writes nothing"


def test_a_run_logs_its_peaks_beside_the_plans(workshop: Workshop, tmp_path: Path) -> None:
    options = workshop.options(tmp_path / "run", save=tmp_path / "checkpoints", device="cpu")
    planned = json.loads(run("plan", *flags(options), "--hardware", "8G-host", "--json").stdout)
    done = run("train", *flags(options))
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    phases = {phase["name"]: phase["host_bytes"] / 2**30 for phase in planned["phases"]}
    assert last["perf/memory_host_predicted/train"] == max(phases["backward"], phases["optimizer"])
    # Almost all of it is torch and its libraries, whose versions differ in size by some tens of MB of these 500.
    for phase in ("rollout", "train"):
        assert last[f"perf/memory_host/{phase}"] == pytest.approx(last[f"perf/memory_host_predicted/{phase}"], rel=0.15)
    (line,) = [line for line in done.stderr.splitlines() + done.stdout.splitlines() if "host memory, highest" in line]
    assert all(f" {phase} " in line for phase in ("load", "rollout", "train", "save"))
