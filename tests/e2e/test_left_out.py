"""What is left out of a run, or goes wrong in it without ending it, is counted and said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from e2e_runs import Workshop, hook, read_metrics

from lockstep.cli import main
from lockstep.data import load_tokenizer


def test_a_prompt_that_leaves_no_room_for_a_response_is_counted(workshop: Workshop, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(workshop.model)
    prompts = ["1 + 1 =", "12345 + 54321 =", "2 + 2 =", "3 + 3 ="]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"prompt": p, "label": "2"}) for p in prompts))
    own = {"prompt_data": tmp_path / "data.jsonl", "apply_chat_template": None, "rollout_shuffle": None}
    context = len(tokenizer.encode(prompts[1]))
    words = workshop.train(tmp_path, num_rollout=1, rollout_max_context_len=context, **own)
    assert main(words) == 0
    assert read_metrics(tmp_path)[0]["rollout/overlong_prompts"] == 1


def test_rewards_that_fail_in_an_evaluation_are_said(workshop: Workshop, tmp_path: Path, capsys: Any) -> None:
    described = {"name": "heldout", "path": str(workshop.heldout), "custom_rm_path": hook("raises")}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump({"eval": {"datasets": [described]}}))
    words = workshop.train(tmp_path, num_rollout=1, eval_config=tmp_path / "eval.yaml", skip_eval_before_train=True)
    assert main(words) == 0
    assert "rewards failed in this evaluation and count as 0 there: 8 exception" in capsys.readouterr().out


@pytest.mark.parametrize(("rm_type", "is_said"), [("deepscaler", True), ("random", False)])
def test_a_step_in_which_nobody_ended_its_thinking_says_why_all_scored_zero(
    workshop: Workshop, tmp_path: Path, capsys: Any, rm_type: str, is_said: bool
) -> None:
    assert main(workshop.train(tmp_path, num_rollout=1, custom_rm_path=None, rm_type=rm_type)) == 0
    assert ("no response holds </think> or ###Response" in capsys.readouterr().out) == is_said


def test_a_run_from_an_earlier_rollout_moves_the_checkpoints_of_its_steps_aside(
    workshop: Workshop, tmp_path: Path
) -> None:
    """A checkpoint of the same name would otherwise pass for this run's, and the new weights would not be saved."""
    kept = {"save": tmp_path / "ckpt", "save_interval": 1}
    assert main(workshop.train(tmp_path / "run", num_rollout=2, **kept)) == 0
    again = {"load": tmp_path / "ckpt", "start_rollout_id": 1, "lr": 1e-2}
    assert main(workshop.train(tmp_path / "run", num_rollout=2, **kept, **again)) == 0
    states = [json.loads((tmp_path / "ckpt" / f"rollout_{n:07d}" / "state.json").read_text()) for n in (0, 1)]
    assert [state["trainer"]["num_steps_done"] for state in states] == [1, 3]
    assert (tmp_path / "ckpt" / "earlier-1" / "rollout_0000001").is_dir()


def test_a_step_whose_sampler_disagrees_can_be_looked_at_and_is_not_saved(workshop: Workshop, tmp_path: Path) -> None:
    limited = {"logprob_diff_limit": 1e-12, "save": tmp_path / "ckpt", "save_interval": 1}
    assert main(workshop.train(tmp_path, num_rollout=2, **limited)) == 1
    (row,) = read_metrics(tmp_path)
    assert row["train/train_rollout_logprob_abs_diff"] > 1e-12
    assert main(["report", str(tmp_path)]) == 0
    (first, *_) = (tmp_path / "samples" / "0000000.jsonl").read_text().splitlines()
    assert len(json.loads(first)["policy_log_probs"]) > 0
    assert not list((tmp_path / "ckpt").iterdir())


@pytest.mark.parametrize("over_sampling", [3, 6])
def test_groups_that_were_better_than_nothing_are_seen_whether_used_or_not(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, over_sampling: int
) -> None:
    monkeypatch.setenv("E2E_CALLS", str(tmp_path / "calls.jsonl"))
    hooks = {
        "dynamic_sampling_filter_path": hook("better_than_nothing"),
        "rollout_all_samples_process_path": hook("see_all_samples"),
    }
    words = workshop.train(tmp_path, num_rollout=1, over_sampling_batch_size=over_sampling, **hooks)
    assert main(words) == 0
    ((name, seen),) = map(json.loads, (tmp_path / "calls.jsonl").read_text().splitlines())
    assert (name, sorted(seen)) == ("see_all_samples", list(range(over_sampling)))
