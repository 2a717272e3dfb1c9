"""Sampling beside training: what is trained on which weights' samples, and what a resumed run repeats."""

from __future__ import annotations

import asyncio
import json
import shutil
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from e2e_runs import Workshop, assert_same_checkpoint, flags, hook, read_metrics, run

from lockstep.assemble import assemble
from lockstep.cli import main
from lockstep.config.parsing import parse_options
from lockstep.loop import run_rollout, train_on
from lockstep.observer import Clock, Observer
from lockstep.sampling import give_newest_weights
from lockstep.tracking.progress import RunProgress

NUM_ROLLOUT = 5
OTHERS = {"rollout_num_gpus": 1}
OWN = ("perf/", "rollout/avg_cached_tokens", "rollout/prefix_cache_hit_rate", "eval/")


def options(root: Path, **changes: Any) -> dict[str, Any]:
    return {
        "num_rollout": NUM_ROLLOUT,
        "save": root / "checkpoints",
        "load": root / "checkpoints",
        "save_interval": 2,
        "num_steps_per_rollout": 2,
        "use_tis": True,
        "eval_interval": 2,
        "skip_eval_before_train": True,
        "custom_generate_function_path": hook("two_turns"),
        **OTHERS,
    } | changes


def words(workshop: Workshop, root: Path, **changes: Any) -> list[str]:
    return [
        *workshop.train(root, **options(root, **changes)),
        *flags({"eval_prompt_data": ["heldout", workshop.heldout]}),
    ]


@pytest.fixture(scope="module")
def one_step_off(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("one-step-off")
    run(*words(workshop, root, schedule="one-step-off"))
    return root


async def by_hand(words: list[str]) -> list[dict[str, float]]:
    """One step off, in one process, whose weights are sampled from before they change: sample 0, sample 1, train 0,
    sample 2, train 1, and so on. Returns the metrics of every step."""
    config = parse_options("train", words[1:]).config
    async with AsyncExitStack() as stack:
        clock = Clock(RunProgress("by hand", NUM_ROLLOUT))
        state = assemble(config, stack, on_sampled=clock.sampled, on_trained=clock.trained)
        assert state.context is not None
        await stack.enter_async_context(state.context.rewards)
        observer = Observer(state, clock)

        async def sampled(rollout_id: int) -> Any:
            give_newest_weights(state)
            return await run_rollout(state, observer, rollout_id)

        rows, next_one = [], await sampled(0)
        for rollout_id in range(NUM_ROLLOUT):
            this_one = next_one
            if rollout_id + 1 < NUM_ROLLOUT:
                next_one = await sampled(rollout_id + 1)
            rows.append(this_one.metrics | train_on(state, observer, rollout_id, this_one.groups))
        return rows


def test_one_step_off_trains_on_samples_of_the_weights_before(
    workshop: Workshop, one_step_off: Path, tmp_path: Path
) -> None:
    """Against the same stages, called one after another in one process that has no copy of the weights. Rewards and
    tokens are equal; numbers may differ by the rounding of fp32, as more rows are decoded at once there."""
    expected = asyncio.run(
        by_hand(words(workshop, tmp_path, load=None, save=None, save_interval=None, rollout_num_gpus=None))
    )
    rows = read_metrics(one_step_off)
    assert [row["step"] for row in rows] == list(range(NUM_ROLLOUT))
    for row, wanted in zip(rows, expected, strict=True):
        names = [name for name in wanted if name.startswith(("train/", "rollout/")) and not name.startswith(OWN)]
        assert len(names) > 30
        assert {name: row[name] for name in names} == pytest.approx({name: wanted[name] for name in names}, abs=1e-5)


def test_the_schedule_of_every_step_is_recorded(one_step_off: Path) -> None:
    rows = [json.loads(line) for line in (one_step_off / "metrics.jsonl").read_text().splitlines()]
    assert [row["rollout/policy_version_min"] for row in rows] == [0, 0, 2, 4, 6]  # two optimizer steps a rollout
    assert [row["rollout/policy_version_max"] for row in rows] == [0, 0, 2, 4, 6]
    assert [row["rollout/staleness_max"] for row in rows] == [0, 1, 1, 1, 1]
    assert all(row["train/tis"] != 1 for row in rows[1:]), "old weights' samples have other log-probs"
    for row, following in pairwise(rows):
        assert row["perf/rollout_ended_at"] <= row["perf/train_started_at"] < row["perf/train_ended_at"]
        assert following["perf/rollout_started_at"] < row["perf/train_ended_at"], "it is sampled beside training"
        assert row["perf/train_ended_at"] < following["perf/train_started_at"]
    assert [row["step"] for row in rows if "eval/heldout" in row] == [1, 3, 4]


def test_one_step_off_resumes_bit_for_bit(workshop: Workshop, one_step_off: Path, tmp_path: Path) -> None:
    """The rollout that was sampled ahead is in the checkpoint, as weights that could sample it again are gone."""
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(one_step_off / "checkpoints" / "rollout_0000001", tmp_path / "checkpoints" / "rollout_0000001")
    run(*words(workshop, tmp_path, schedule="one-step-off"))
    assert read_metrics(tmp_path) == read_metrics(one_step_off)[2:]
    for name in ("rollout_0000003", f"rollout_{NUM_ROLLOUT - 1:07d}"):
        assert_same_checkpoint(tmp_path / "checkpoints" / name, one_step_off / "checkpoints" / name)


def test_asynchronous_training_keeps_its_bound_and_resumes(workshop: Workshop, tmp_path: Path) -> None:
    """Two replicas; responses go on under new weights; what was not finished at a checkpoint is sampled again."""
    changes = {"schedule": "async", "max_staleness": 2, "rollout_num_gpus": 2, "custom_generate_function_path": None}
    run(*words(workshop, tmp_path, **changes, num_rollout=4))
    run(*words(workshop, tmp_path, **changes, num_rollout=8))
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(8))
    assert [row["train/step"] for row in rows] == [2.0 * (step + 1) for step in range(8)]
    assert all(0 <= row["rollout/staleness_mean"] <= row["rollout/staleness_max"] <= 2 for row in rows)
    assert max(row["rollout/staleness_max"] for row in rows) >= 1
    assert [row["step"] for row in rows if "eval/heldout" in row] == [1, 3, 5, 7]
    state = json.loads((tmp_path / "checkpoints" / "rollout_0000007" / "state.json").read_text())
    drawn = sum(row["rollout/prompts_drawn"] for row in rows)
    assert drawn == 8 * 3, "every rollout draws its prompts once"
    assert state["data_source"]["sample_index"] == 8 * 3 * 4, "no prompt is left out or drawn twice"


@pytest.mark.parametrize(
    ("changes", "flag", "says"),
    [
        ({"schedule": "one-step-off", "rollout_num_gpus": None}, "--schedule", "Give sampling GPUs of its own"),
        ({"schedule": "async", "max_staleness": 0}, "--max-staleness", "1 behind or more"),
        ({"schedule": "sync", "max_staleness": 1}, "--max-staleness", "use --schedule async"),
        ({"rollout_num_gpus_per_engine": 2}, "--rollout-num-gpus-per-engine", "lies on one GPU"),
    ],
)
def test_what_cannot_work_is_refused(
    workshop: Workshop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    flag: str,
    says: str,
) -> None:
    assert main(words(workshop, tmp_path, **changes)) == 2
    error = capsys.readouterr().err
    assert f"lockstep: error: {flag} is " in error
    assert says in error
