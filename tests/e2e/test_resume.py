"""A run that is killed anywhere and resumed is the run that was never killed, bit for bit."""

from __future__ import annotations

import random
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_runs import (
    Workshop,
    assert_nobody_lives,
    assert_same_checkpoint,
    checkpoint_tensors,
    finish,
    hook,
    read_metrics,
    run,
    start,
)
from transformers import AutoModelForCausalLM

from lockstep.checkpoint.training import list_checkpoints
from lockstep.cli import main

NUM_ROLLOUT, SAVE_INTERVAL = 8, 2
LAST = f"rollout_{NUM_ROLLOUT - 1:07d}"

CHAINS = {
    "in a step": [("rollout 3", 1), ("train 3", 1), ("eval 3", 1)],
    "in a save": [("save:mkdir rollout_0000003", 1), ("save:distcp rollout_0000003", 1)],
    "late in a save": [("save:json rollout_0000003", 1), ("save:rename rollout_0000003", 1)],
    "after a save": [
        ("save:renamed rollout_0000003", 3),
        ("save:delete rollout_0000001", 5),
        ("save:renamed rollout_0000007", 7),
    ],
}
"""Runs that are killed at each moment in turn, resumed each time and finished at last. The number is the newest
checkpoint that stands after the kill."""


def options(root: Path, **changes: Any) -> dict[str, Any]:
    """Everything that a resumed run could get wrong: filters, a buffer, a moving reference, several steps a rollout."""
    return {
        "save": root / "checkpoints",
        "load": root / "checkpoints",
        "save_interval": SAVE_INTERVAL,
        "keep_last_checkpoints": 2,
        "save_hf": root / "hf",
        "num_rollout": NUM_ROLLOUT,
        "num_steps_per_rollout": 2,
        "over_sampling_batch_size": 5,
        "rollout_max_running_requests": 8,
        "dynamic_sampling_filter_path": hook("two_of_three"),
        "rollout_sample_hook_path": hook("at_sample"),
        "rollout_data_postprocess_path": hook("shake_advantages"),
        "use_kl_loss": True,
        "kl_loss_coef": 0.1,
        "ref_update_interval": 3,
        "use_rollout_routing_replay": True,
        "eval_prompt_data": ["heldout", None],
        "eval_interval": 2,
    } | changes


def words(workshop: Workshop, root: Path) -> list[str]:
    return workshop.train(root, **options(root, eval_prompt_data=["heldout", workshop.heldout]))


def environment(root: Path, moment: str = "") -> dict[str, str]:
    return {"E2E_DELAY": "0.2", "E2E_TOKEN": str(root), "E2E_MOMENT": moment and f"SIGKILL {moment}"}


def newest(root: Path) -> int:
    return int(list_checkpoints(root / "checkpoints")[-1].name.removeprefix("rollout_"))


def whole_run(workshop: Workshop, root: Path) -> Path:
    run(*words(workshop, root), env=environment(root))
    return root


def killed_run(workshop: Workshop, root: Path, moments: list[tuple[str, int]]) -> Path:
    for moment, checkpoint in moments:
        run(*words(workshop, root), env=environment(root, moment), code=-9)
        assert newest(root) == checkpoint, f"killed at {moment}"
        assert_nobody_lives(str(root))
    return whole_run(workshop, root)


def run_killed_from_outside(workshop: Workshop, root: Path, num_kills: int = 2) -> Path:
    """Killed after a random time, which no moment of the code has to do with."""
    after = random.Random(7)
    for _ in range(num_kills):
        process = start(*words(workshop, root), env=environment(root))
        metrics = root / "metrics.jsonl"
        lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        while not metrics.exists() or metrics.read_bytes().count(b"\n") <= max(lines, 2):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(after.uniform(0, 0.8))
        process.kill()
        assert finish(process).returncode == -9
        assert_nobody_lives(str(root))
    return whole_run(workshop, root)


@pytest.fixture(scope="module")
def runs(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[Path]]:
    """All runs of this file, two at a time."""
    root = tmp_path_factory.mktemp("resume")
    with ThreadPoolExecutor(2) as pool:
        futures = {
            "whole": pool.submit(whole_run, workshop, root / "whole"),
            "again": pool.submit(whole_run, workshop, root / "again"),
            "outside": pool.submit(run_killed_from_outside, workshop, root / "outside"),
        }
        for number, (name, moments) in enumerate(CHAINS.items()):
            futures[name] = pool.submit(killed_run, workshop, root / f"chain-{number}", moments)
    return futures


def test_the_run_is_one_that_a_resume_could_get_wrong(runs):
    """Otherwise the tests below would prove little."""
    rows = read_metrics(runs["whole"].result())
    assert [row["step"] for row in rows] == [-1, *range(NUM_ROLLOUT)]
    assert sum(row.get("rollout/dynamic_filter/drop_third", 0) for row in rows) > 0
    assert sum(row.get("rollout/prompts_deferred", 0) for row in rows) > 0
    assert all(row["rollout/prefix_cache_hit_rate"] > 0.3 for row in rows[1:])
    assert all(row["train/step"] == 2 * (row["step"] + 1) for row in rows[1:])
    assert len({row["train/kl_loss"] for row in rows[1:]}) == NUM_ROLLOUT
    assert [row["step"] for row in rows if "eval/heldout" in row] == [-1, 1, 3, 5, 7]


def test_two_runs_are_equal_whatever_the_rewards_take(runs):
    whole, again = runs["whole"].result(), runs["again"].result()
    assert read_metrics(again) == read_metrics(whole)
    assert_same_checkpoint(again / "checkpoints" / LAST, whole / "checkpoints" / LAST)


@pytest.mark.parametrize("name", [*CHAINS, "outside"])
def test_killed_and_resumed_is_the_run_that_was_never_killed(runs, name):
    whole, killed = runs["whole"].result(), runs[name].result()
    assert read_metrics(killed) == read_metrics(whole)
    assert_same_checkpoint(killed / "checkpoints" / LAST, whole / "checkpoints" / LAST)
    for file in ("model.safetensors", "config.json"):
        assert (killed / "hf" / file).read_bytes() == (whole / "hf" / file).read_bytes()


@pytest.mark.parametrize("name", [*CHAINS, "outside"])
def test_kills_leave_no_rubbish(runs, name):
    root = runs[name].result()
    assert sorted(path.name for path in (root / "checkpoints").iterdir()) == ["rollout_0000005", LAST]
    assert not list(root.rglob("*.incomplete"))
    assert not list(root.rglob("*.new"))


def test_the_export_loads_in_transformers_and_holds_the_trained_weights(runs, workshop):
    root = runs["whole"].result()
    model = AutoModelForCausalLM.from_pretrained(root / "hf", dtype=torch.float32)
    trained = checkpoint_tensors(root / "checkpoints" / LAST)
    assert torch.equal(model.lm_head.weight, trained["model.lm_head.weight"])
    from lockstep.checkpoint.hf import load_hf_model
    from lockstep.kernels.packed import PackedDocuments

    ours = load_hf_model(root / "hf", dtype=torch.float32, device=torch.device("cpu"))
    ids = torch.arange(3, 40)
    with torch.no_grad():
        theirs = model(ids[None]).logits[0]
        hidden = ours(ids, torch.arange(len(ids)), PackedDocuments([len(ids)], ids.device))
        torch.testing.assert_close(ours.lm_head(hidden), theirs, atol=1e-5, rtol=1e-5)
    start_weights = load_hf_model(workshop.model, dtype=torch.float32, device=torch.device("cpu"))
    assert not torch.equal(start_weights.lm_head.weight, ours.lm_head.weight)


def test_a_new_run_in_old_folders_moves_what_it_finds_aside(runs, workshop, tmp_path, capsys):
    """Otherwise --load would take the earlier run's newest checkpoint for the new run's."""
    root = tmp_path / "run"
    shutil.copytree(runs["again"].result(), root)
    before = read_metrics(root)
    changes = {"load": None, "num_rollout": 1, "eval_prompt_data": None, "eval_interval": None, "save_hf": None}
    assert main(workshop.train(root, **options(root, **changes))) == 0
    assert f"moved to {root / 'earlier-1'}" in capsys.readouterr().out.replace("\n", "")
    assert read_metrics(root / "earlier-1") == before
    assert [path.name for path in list_checkpoints(root / "checkpoints" / "earlier-1")] == ["rollout_0000005", LAST]
    assert [path.name for path in list_checkpoints(root / "checkpoints")] == ["rollout_0000000"]
    assert [row["step"] for row in read_metrics(root)] == [0]


def test_a_finished_run_has_nothing_left_to_do(runs, workshop, tmp_path, capsys):
    root = tmp_path / "run"
    shutil.copytree(runs["again"].result(), root)
    assert main(words(workshop, root)) == 0
    told = capsys.readouterr().out.replace("\n", "")
    assert f"going on after step {NUM_ROLLOUT} of {NUM_ROLLOUT}, from {root / 'checkpoints' / LAST}" in told
    assert f"nothing is left to do: {NUM_ROLLOUT} of {NUM_ROLLOUT} rollouts are done" in told
    assert f"report {root / 'report.html'}" in told
    assert read_metrics(root) == read_metrics(runs["again"].result())
