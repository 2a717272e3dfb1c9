"""`lockstep train --rollout-engine sglang` from end to end."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from real_servers import CPU_ARGS, PYTHON


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, runs: ModuleType) -> Any:
    root = tmp_path_factory.mktemp("workshop")
    prepare = runs.load_prepare()
    for side, count in (("train", 64), ("heldout", 8)):
        prepare.write_rows(root / f"{side}.jsonl", prepare.make_prompt_rows(side, count, 0))
    return runs.Workshop(root, runs.write_model(root / "model"), root / "train.jsonl", root / "heldout.jsonl")


def servers(**changes: Any) -> dict[str, Any]:
    """Options for a real server on the CPU."""
    options = {"rollout_engine": "sglang", "sglang_python": PYTHON, "rollout_server_start_timeout": 300}
    return options | {f"sglang_{name}": value for name, value in (CPU_ARGS | changes).items()}


@pytest.mark.parametrize(
    ("transport", "server_dtype", "bound"),
    [("tensor", "float32", 1e-5), ("nccl", "bfloat16", 0.02)],
)
def test_two_steps_of_grpo_agree_with_the_trainer_and_leave_no_process(
    transport: str, server_dtype: str, bound: float, workshop: Any, runs: ModuleType, tmp_path: Path
) -> None:
    """The trainer is fp32: what a server adds in fp32 is the order of sums, in bf16 its rounding."""
    options = servers(dtype=server_dtype) | {
        "use_rollout_routing_replay": True,
        "update_weight_transport": transport,
        "check_weight_update_equal": True,
        "eval_prompt_data": ["held", workshop.heldout],
    }
    token = f"sglang-{transport}"
    words = workshop.train(tmp_path / "run", **options)
    runs.finish(done := runs.start(*words, env={"E2E_TOKEN": token}), timeout=500)
    log = (tmp_path / "run" / "sglang" / "server-0.log").read_text()
    assert done.returncode == 0, log[-3000:]
    rows = [row for row in runs.read_metrics(tmp_path / "run") if row["step"] >= 0]
    assert len(rows) == 2
    for row in rows:
        assert 0 < row["train/train_rollout_logprob_abs_diff"] < bound
        assert row["train/grad_norm"] > 0
    runs.assert_nobody_lives(token)
