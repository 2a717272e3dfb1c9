"""`lockstep train --rollout-engine sglang` from end to end."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from real_servers import server_options

TRAINERS: dict[str, dict[str, Any]] = {
    "one-rank": {},
    "two-stages-to-one-server": {
        "actor_num_gpus_per_node": 2,
        "pipeline_model_parallel_size": 2,
        "rollout_num_gpus": 1,
        "update_weight_transport": "nccl",
    },
    "divided-experts-to-two-servers": {
        "actor_num_gpus_per_node": 2,
        "expert_model_parallel_size": 2,
        "update_weight_transport": "tensor",
    },
}


@pytest.mark.parametrize(
    ("trainer", "server_dtype", "bound"),
    [
        ("one-rank", "bfloat16", 0.02),
        ("two-stages-to-one-server", "float32", 1e-5),
        ("divided-experts-to-two-servers", "float32", 1e-5),
    ],
)
def test_two_steps_of_grpo_agree_with_the_trainer_and_leave_no_process(
    trainer: str, server_dtype: str, bound: float, workshop: Any, runs: ModuleType, tmp_path: Path
) -> None:
    """The trainer is fp32: what a server adds in fp32 is the order of sums, in bf16 its rounding.

    Servers compare what they were sent with an export, bit for bit.
    """
    options = server_options(dtype=server_dtype) | {
        "use_rollout_routing_replay": True,
        "check_weight_update_equal": True,
        "eval_prompt_data": ["held", workshop.heldout] if trainer == "one-rank" else None,
    }
    options |= TRAINERS[trainer]
    token = f"sglang-{trainer}"
    words = workshop.train(tmp_path / "run", **options)
    runs.finish(done := runs.start(*words, env={"E2E_TOKEN": token}), timeout=1200)
    log = (tmp_path / "run" / "sglang" / "server-0.log").read_text()
    assert done.returncode == 0, log[-3000:]
    assert "enable_return_routed_experts=True" in log
    assert "disable_shared_experts_fusion=True" in log
    rows = [row for row in runs.read_metrics(tmp_path / "run") if row["step"] >= 0]
    assert len(rows) == 2
    for row in rows:
        assert 0 < row["train/train_rollout_logprob_abs_diff"] < bound
        assert row["train/grad_norm"] > 0
    runs.assert_nobody_lives(token)
