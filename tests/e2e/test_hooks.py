"""The user's functions at work in whole runs, by what they change."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from e2e_runs import Workshop, hook, read_metrics
from safetensors.torch import load_file

from lockstep.cli import main


@pytest.fixture
def train(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a recipe in this process; returns the metrics of its steps."""
    monkeypatch.setenv("E2E_CALLS", str(tmp_path / "calls.jsonl"))

    def train(**changes: Any) -> list[dict[str, Any]]:
        root = tmp_path / "run"
        kept = {
            "num_rollout": 1,
            "save_debug_rollout_data": root / "rollout_{rollout_id}.pt",
            "save_debug_train_data": root / "train_{rollout_id}.pt",
        }
        assert main(workshop.train(root, **kept | changes)) == 0
        return read_metrics(root)

    return train


def samples_of(tmp_path: Path, rollout_id: int = 0) -> list[dict[str, Any]]:
    content = torch.load(tmp_path / "run" / f"rollout_{rollout_id}.pt", weights_only=True)
    return content["samples"]


def training_of(tmp_path: Path, rollout_id: int = 0) -> list[dict[str, Any]]:
    return torch.load(tmp_path / "run" / f"train_{rollout_id}.pt", weights_only=False)


def calls(tmp_path: Path, name: str) -> list[Any]:
    lines = map(json.loads, (tmp_path / "calls.jsonl").read_text().splitlines())
    return [values for called, values in lines if called == name]


def test_the_functions_of_the_page_on_hooks_work(train, tmp_path):
    page = Path(__file__).parents[2] / "docs" / "hooks.md"
    hooks = tmp_path / "hooks.py"
    hooks.write_text("\n\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)))
    train(
        custom_rm_path=f"{hooks}:reward",
        custom_generate_function_path=f"{hooks}:generate",
        dynamic_sampling_filter_path=f"{hooks}:keep",
    )
    for sample in samples_of(tmp_path):
        assert 0 in sample["loss_mask"]
        assert sample["metadata"]["round_number"] == 2


@pytest.mark.parametrize("settings", [{}, {"rollout_top_p": 0.8, "use_rollout_routing_replay": True}])
def test_a_tool_turn_is_not_trained_and_parity_holds_around_it(train, tmp_path, settings):
    rows = train(custom_generate_function_path=hook("two_turns"), num_rollout=2, **settings)
    for rollout_id, row in enumerate(rows):
        lengths = []
        for sample in samples_of(tmp_path, rollout_id):
            length, mask = sample["response_length"], sample["loss_mask"]
            first = mask.index(0)
            assert mask == [1] * first + [0] * 4 + [1] * (length - first - 4)
            assert sample["weight_versions"] == [str(rollout_id) if on else "" for on in mask]
            assert all((log_prob != 0) == on for log_prob, on in zip(sample["rollout_log_probs"], mask, strict=True))
            assert "=42?" in sample["response"]
            lengths.append(sum(mask))
        assert row["rollout/response_len/mean"] == np.mean(lengths)
        assert row["train/train_rollout_logprob_abs_diff"] < 1e-5
        assert row["train/train_rollout_logprob_abs_diff_max"] < 1e-4


def test_a_group_reward_sees_whole_groups_in_training_and_in_evaluation(train, tmp_path, workshop):
    rows = train(
        custom_rm_path=hook("ranks"),
        group_rm=True,
        eval_prompt_data=["heldout", f"{workshop.heldout}@[0:2]"],
        n_samples_per_eval_prompt=3,
        skip_eval_before_train=True,
    )
    assert [s["reward"] for s in samples_of(tmp_path)] == [0.0, 1.0, 2.0, 3.0] * 3
    assert sorted(calls(tmp_path, "ranks")) == [[0, 1, 2], [0, 1, 2, 3], [3, 4, 5], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert rows[0]["rollout/raw_reward"] == 1.5
    assert rows[0]["eval/heldout"] == 1.0


def test_groups_of_equal_rewards_are_filtered_and_replaced(train, tmp_path):
    rows = train(
        custom_rm_path=hook("constant_in_odd_groups"),
        dynamic_sampling_filter_path="lockstep.rollout.hooks.check_nonzero_std",
        over_sampling_batch_size=4,
        rollout_all_samples_process_path=hook("see_all_samples"),
    )
    assert [s["group_index"] for s in samples_of(tmp_path)] == [0] * 4 + [2] * 4 + [4] * 4
    assert rows[0]["rollout/dynamic_filter/drop_zero_std_0.5"] == 2
    assert rows[0]["rollout/prompts_drawn"] == 8
    assert rows[0]["rollout/prompts_deferred"] == 3
    assert calls(tmp_path, "see_all_samples") == [[0, 2, 4, 1, 3]]


def test_a_buffer_filter_chooses_which_deferred_groups_come_next(train, tmp_path):
    train(over_sampling_batch_size=6, buffer_filter_path=hook("newest_first"), num_rollout=2)
    assert [s["group_index"] for s in samples_of(tmp_path, 0)][::4] == [0, 1, 2]
    assert calls(tmp_path, "newest_first") == [[3, 4, 5]]
    train_order = [s["group_index"] for s in samples_of(tmp_path, 1)][::4]
    assert train_order == [3, 4, 5]


def test_removed_samples_count_in_mean_and_std_but_not_in_the_loss(train, tmp_path):
    train(custom_rm_path=hook("constant_in_odd_groups"), rollout_sample_filter_path=hook("remove_best"))
    samples, trained = samples_of(tmp_path), training_of(tmp_path)
    rewards = np.array([s["reward"] for s in samples]).reshape(3, 4)
    deviations = rewards - rewards.mean(axis=1, keepdims=True)
    expected = deviations / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose([s["advantage"] for s in trained], expected.reshape(-1), rtol=1e-6, atol=1e-6)
    assert [s["remove_sample"] for s in samples] == [i in (3, 4, 11) for i in range(12)]
    weights = [0.0 if s["remove_sample"] else 1 / (12 * s["response_length"]) for s in samples]
    np.testing.assert_allclose([s["loss_weight"] for s in trained], weights, rtol=1e-6)


def test_a_sample_hook_changes_what_the_reward_sees(train, tmp_path, workshop):
    rows = train(
        rollout_sample_hook_path=hook("stamp"),
        custom_rm_path=hook("by_metadata"),
        eval_prompt_data=["heldout", workshop.heldout],
        skip_eval_before_train=True,
    )
    assert [s["reward"] for s in samples_of(tmp_path)] == list(map(float, range(12)))
    assert rows[0]["eval/heldout"] == -1


def test_data_postprocess_has_the_last_word_on_training(train, tmp_path, workshop):
    saving = {"save": tmp_path / "checkpoints", "save_hf": tmp_path / "hf"}
    train(rollout_data_postprocess_path=hook("no_advantages"), weight_decay=0, **saving)
    trained = load_file(tmp_path / "hf" / "model.safetensors")
    start = load_file(workshop.model / "model.safetensors")
    assert [name for name in start if not torch.equal(start[name], trained[name])] == []


def test_custom_log_functions_see_the_samples_and_may_replace_the_metrics(train, tmp_path, workshop):
    before, first, second = train(
        custom_rollout_log_function_path=hook("log_rollout"),
        custom_eval_rollout_log_function_path=hook("log_eval"),
        eval_prompt_data=["heldout", workshop.heldout],
        num_rollout=2,
    )
    assert calls(tmp_path, "log_rollout") == [[0, 12, 3.0, True], [1, 12, 3.0, True]]
    assert calls(tmp_path, "log_eval") == [[-1, 8], [1, 8]]
    assert "eval/heldout" not in before
    assert "eval/heldout" in second
    assert "rollout/raw_reward" not in first
    assert "train/loss" in first
    assert "rollout/raw_reward" in second


def test_a_reward_may_be_a_dict_of_which_one_entry_trains(train, tmp_path):
    rows = train(custom_rm_path=hook("as_dict"), reward_key="score")
    assert samples_of(tmp_path)[5]["reward"] == {"score": 5.0, "other": -1.0}
    assert rows[0]["rollout/raw_reward"] == 5.5


def test_reward_post_processing_replaces_the_group_normalisation(train, tmp_path):
    train(custom_reward_post_process_path=hook("negated"))
    assert [s["advantage"] for s in training_of(tmp_path)] == [-float(i) for i in range(12)]


def test_a_rollout_function_may_return_plain_groups(train, tmp_path):
    rows = train(rollout_function_path=hook("groups_only"))
    assert len(samples_of(tmp_path)) == 12
    assert rows[0]["train/global_batch_size"] == 12


def test_a_rollout_function_may_report_metrics_of_its_own(train):
    (row,) = train(rollout_function_path=hook("own_metrics"))
    assert row["mine/number"] == 2.5
    assert row["rollout/prompts_trained"] == 3


HANGING = {"reward_timeout": 0.5, "reward_num_workers": 4}


def test_dropped_rewards_leave_smaller_groups(train, tmp_path):
    rows = train(custom_rm_path=hook("hangs_at_first"), **HANGING)
    assert rows[0]["rollout/reward_timeout"] == 3
    assert [s["index"] for s in samples_of(tmp_path)] == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    np.testing.assert_allclose([s["advantage"] for s in training_of(tmp_path)], [-1, 0, 1] * 3, atol=1e-5)


def test_failed_rewards_are_reported_with_their_reason(train, caplog):
    train(custom_rm_path=hook("hangs_at_first"), **HANGING)
    assert "Rewards of rollout 0 failed, the first with: no answer within 0.5 s" in caplog.text


def test_zero_rewards_keep_their_samples(train, tmp_path):
    rows = train(custom_rm_path=hook("hangs_at_first"), reward_failure_policy="zero", **HANGING)
    assert rows[0]["rollout/reward_timeout"] == 3
    assert [s["reward"] for s in samples_of(tmp_path)] == [0, 1, 2, 3, 0, 5, 6, 7, 0, 9, 10, 11]


def test_a_group_without_rewards_is_replaced_and_counted(train, tmp_path):
    rows = train(custom_rm_path=hook("hangs_in_the_first_group"), **HANGING)
    assert rows[0]["rollout/reward_timeout"] == 4
    assert rows[0]["rollout/prompts_failed"] == 1
    assert rows[0]["rollout/groups_dropped_too_small"] == 1
    assert [s["group_index"] for s in samples_of(tmp_path)] == [1] * 4 + [2] * 4 + [3] * 4


def test_a_reward_failure_stops_the_run_if_the_user_wants_that(workshop, tmp_path, capsys):
    words = workshop.train(
        tmp_path, custom_rm_path=hook("hangs_at_first"), reward_failure_policy="stop", num_rollout=1, **HANGING
    )
    assert main(words) == 1
    message = capsys.readouterr().err
    assert "hangs_at_first" in message
    assert "0.5 s" in message


def test_failures_of_groups_that_were_not_needed_are_not_counted(train, tmp_path):
    """They fail or not, as the clock will have it: counting them would make the metric depend on it."""
    rows = train(custom_rm_path=hook("fails_at_once_where_deferred"), over_sampling_batch_size=9)
    assert rows[0]["rollout/prompts_deferred"] == 6
    assert rows[0]["rollout/reward_exception"] == 0
