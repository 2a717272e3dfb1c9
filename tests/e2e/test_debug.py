"""Running half of the loop on what the other half left, evaluating, and reporting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_runs import Workshop, checkpoint_tensors, flags, hook, read_metrics

from lockstep.checkpoint.training import read_state
from lockstep.cli import main

NUM_ROLLOUT = 3
LAST = f"rollout_{NUM_ROLLOUT - 1:07d}"


def options(workshop: Workshop, root: Path, **changes: Any) -> list[str]:
    common = {
        "save": root / "checkpoints",
        "num_rollout": NUM_ROLLOUT,
        "eval_prompt_data": ["heldout", workshop.heldout],
        "use_rollout_routing_replay": True,
        "rollout_data_postprocess_path": hook("shake_advantages"),
    }
    return workshop.train(root, **common | changes)


@pytest.fixture(scope="module")
def original(workshop, tmp_path_factory) -> Path:
    """An ordinary run that keeps its rollouts."""
    root = tmp_path_factory.mktemp("original")
    rollouts, training = root / "rollouts" / "{rollout_id}.pt", root / "training" / "{rollout_id}.pt"
    run(options(workshop, root, save_debug_rollout_data=rollouts, save_debug_train_data=training))
    return root


def run(words: list[str]) -> None:
    assert main(words) == 0


def of_training(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name.startswith("train/")} for row in rows]


def test_training_on_saved_rollouts_gives_the_same_weights(original, workshop, tmp_path):
    saved = original / "rollouts" / "{rollout_id}.pt"
    alone = {"load_debug_rollout_data": saved, "prompt_data": None, "debug_train_only": True, "eval_prompt_data": None}
    run(options(workshop, tmp_path, **alone))
    ours, theirs = (root / "checkpoints" / LAST for root in (tmp_path, original))
    tensors, others = checkpoint_tensors(ours), checkpoint_tensors(theirs)
    assert [name for name in others if not torch.equal(tensors[name], others[name])] == []
    assert read_state(ours)["random"] == read_state(theirs)["random"]
    expected = of_training([row for row in read_metrics(original) if row["step"] >= 0])
    assert of_training(read_metrics(tmp_path)) == expected


def test_the_training_data_of_a_rollout_can_be_kept(original):
    samples = torch.load(original / "training" / "0.pt", weights_only=False)
    assert len(samples) == 12
    assert abs(sum(s["loss_weight"] * sum(s["loss_mask"]) for s in samples) - 1) < 1e-6


def test_rollout_only_samples_the_same_and_trains_nothing(original, workshop, tmp_path):
    template = tmp_path / "{rollout_id}.pt"
    run(options(workshop, tmp_path, debug_rollout_only=True, save_debug_rollout_data=template, num_rollout=2))
    ours, theirs = (torch.load(folder / "0.pt", weights_only=True) for folder in (tmp_path, original / "rollouts"))
    assert [s["tokens"] for s in ours["samples"]] == [s["tokens"] for s in theirs["samples"]]
    assert [s["reward"] for s in ours["samples"]] == [s["reward"] for s in theirs["samples"]]
    second = torch.load(tmp_path / "1.pt", weights_only=True)
    assert {version for s in second["samples"] for version in s["weight_versions"]} == {"0"}
    rows = read_metrics(tmp_path)
    assert not [name for row in rows for name in row if name.startswith("train/")]
    before, *after = [row["eval/heldout"] for row in rows if "eval/heldout" in row]
    assert after == [before]


def test_a_fraction_of_the_saved_groups_is_enough(original, workshop, tmp_path):
    saved = original / "rollouts" / "{rollout_id}.pt"
    few = {"load_debug_rollout_data": saved, "load_debug_rollout_data_subsample": 0.34, "num_rollout": 1}
    run(options(workshop, tmp_path, **few))
    assert [row["train/global_batch_size"] for row in read_metrics(tmp_path)] == [4]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_eval_repeats_the_evaluation_of_a_checkpoint_and_touches_nothing(original, workshop, capsys):
    before = contents(original)
    evaluation = {
        "hf_checkpoint": workshop.model,
        "params_dtype": "float32",
        "num_threads": 1,
        "load": original / "checkpoints",
        "eval_prompt_data": ["heldout", workshop.heldout],
        "input_key": "prompt",
        "label_key": "label",
        "apply_chat_template": True,
        "rollout_max_response_len": 10,
        "custom_rm_path": hook("digits"),
        "run_dir": original,
    }
    run(["eval", *flags(evaluation)])
    printed = dict(line.rsplit(" ", 1) for line in capsys.readouterr().out.splitlines() if line.startswith("eval/"))
    assert printed["eval/heldout"] == f"{read_metrics(original)[-1]['eval/heldout']:.4f}"
    run(["eval", *flags(evaluation | {"load": None})])
    assert f"eval/heldout {read_metrics(original)[0]['eval/heldout']:.4f}" in capsys.readouterr().out.splitlines()
    assert contents(original) == before


def test_a_run_writes_its_report_and_report_writes_it_again(original, tmp_path, capsys):
    assert "eval/heldout" in (original / "report.html").read_text()
    run(["report", str(original), "--output", str(tmp_path / "page.html")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == (original / "report.html").read_text()


def test_a_checkpoint_without_optimizer_state_resumes_with_a_warning(workshop, tmp_path, caplog):
    changes = {"no_save_optim": True, "load": tmp_path / "checkpoints", "eval_prompt_data": None}
    run(options(workshop, tmp_path, num_rollout=1, **changes))
    assert not [n for n in checkpoint_tensors(tmp_path / "checkpoints" / "rollout_0000000") if "exp_avg" in n]
    run(options(workshop, tmp_path, num_rollout=2, **changes))
    assert "holds no optimizer state" in caplog.text
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]
