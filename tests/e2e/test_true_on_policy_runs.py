"""Whole runs with --true-on-policy: no log-prob differs, and what cannot promise that is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from e2e_runs import Workshop, hook, read_metrics, run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_log_prob_of_a_whole_run_differs(workshop: Workshop, tmp_path: Path, dtype: str) -> None:
    """Qwen3-MoE; steps change the weights, the samples of a group share prompts and end at different times."""
    options = {
        "params_dtype": dtype,
        "rollout_stop_token_ids": list(range(0, 128, 16)),
        "rollout_max_response_len": 24,
        "rollout_temperature": 0.9,
        "rollout_top_p": 0.9,
        "use_dynamic_batch_size": True,
        "max_tokens_per_gpu": 150,
        "global_batch_size": 6,
        "lr": 1e-2,
    }
    run(*workshop.train(tmp_path / "run", true_on_policy=True, **options))
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 2
    assert all(row["train/train_rollout_logprob_abs_diff_max"] == 0.0 for row in rows)
    assert all(row["train/routing_flips"] == 0.0 for row in rows)
    assert rows[0]["train/grad_norm"] > 0


def test_a_log_prob_that_was_changed_on_its_way_stops_the_run(workshop: Workshop, tmp_path: Path) -> None:
    words = workshop.train(tmp_path, true_on_policy_mode=True, rollout_sample_hook_path=hook("another_bit"))
    done = run(*words, code=1)
    assert "log-prob of token" in done.stderr
    assert "response token 2 of sample" in done.stderr


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rollout_engine": "sglang", "sglang_python": "python3"}, "another program"),
        ({"actor_num_gpus_per_node": 2, "device": "cpu"}, "not shown to keep every bit"),
        ({"rollout_num_gpus": 1, "device": "cpu"}, "do not compute exactly yet"),
    ],
)
def test_what_cannot_promise_it_is_refused_by_name(
    workshop: Workshop, tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    done = run(*workshop.train(tmp_path, true_on_policy=True, **changes), code=2)
    assert reason in done.stderr.replace("\n", " ")
