"""Interrupted samples go on in the next rollout: what they carry, what the loss sees, and exact resume with them."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from e2e_runs import Workshop, assert_nobody_lives, assert_same_checkpoint, hook, read_metrics, run

from lockstep.checkpoint.training import list_checkpoints, read_state
from lockstep.data.sample_json import sample_from_json
from lockstep.rollout.debug_data import load_rollout
from lockstep.types import Sample

NUM_ROLLOUT = 4
LAST = f"rollout_{NUM_ROLLOUT - 1:07d}"
LONGEST = 40


def words(workshop: Workshop, root: Path, **changes: Any) -> list[str]:
    """Nine groups compete for three places; every third one that is complete is dropped, so rounds follow."""
    options: dict[str, Any] = {
        "partial_rollout": True,
        "over_sampling_batch_size": 9,
        "num_rollout": NUM_ROLLOUT,
        "save": root / "checkpoints",
        "load": root / "checkpoints",
        "save_interval": 1,
        "rollout_max_response_len": LONGEST,
        "rollout_stop_token_ids": list(range(0, 128, 16)),
        "rollout_max_running_requests": 16,
        "dynamic_sampling_filter_path": hook("two_of_three"),
        "rollout_sample_hook_path": hook("at_sample"),
        "use_rollout_routing_replay": True,
        "save_debug_rollout_data": str(root / "rollout_{rollout_id}.pt"),
        "logprob_diff_limit": 1e-5,
    }
    return workshop.train(root, **(options | changes))


def whole_run(workshop: Workshop, root: Path, **changes: Any) -> Path:
    run(*words(workshop, root, **changes), env={"E2E_DELAY": "0.2", "E2E_TOKEN": str(root)})
    return root


def killed_run(workshop: Workshop, root: Path) -> Path:
    """Killed in the midst of a rollout that goes on with samples of the one before, and in training on them."""
    for moment in ("rollout 1", "train 2"):
        env = {"E2E_DELAY": "0.2", "E2E_TOKEN": str(root), "E2E_MOMENT": f"SIGKILL {moment}"}
        run(*words(workshop, root, rollout_data_postprocess_path=hook("at_train")), env=env, code=-9)
        assert_nobody_lives(str(root))
    return whole_run(workshop, root, rollout_data_postprocess_path=hook("at_train"))


@pytest.fixture(scope="module")
def runs(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[Path]]:
    root = tmp_path_factory.mktemp("partial")
    with ThreadPoolExecutor(2) as pool:
        return {
            "whole": pool.submit(whole_run, workshop, root / "whole"),
            "killed": pool.submit(killed_run, workshop, root / "killed"),
            "masked": pool.submit(
                whole_run, workshop, root / "masked", mask_offpolicy_in_partial_rollout=True, num_rollout=2
            ),
        }


def trained(root: Path, rollout_id: int) -> list[Sample]:
    return [s for group in load_rollout(str(root / "rollout_{rollout_id}.pt"), rollout_id) for s in group]


def continued(samples: list[Sample]) -> list[Sample]:
    """Samples that were written under more than one version of the weights."""
    return [sample for sample in samples if len(set(sample.weight_versions)) > 1]


def test_what_was_interrupted_waits_in_the_buffer_and_comes_first(runs):
    root = runs["whole"].result()
    rows = read_metrics(root)
    assert [row["rollout/prompts_trained"] for row in rows] == [3] * NUM_ROLLOUT
    assert all(row["rollout/samples_deferred"] > 0 for row in rows)
    assert [row["rollout/samples_continued"] > 0 for row in rows] == [False, True, True, True]
    for folder, next_folder in zip(list_checkpoints(root / "checkpoints"), rows[1:], strict=False):
        buffer = [[sample_from_json(s) for s in group] for group in read_state(folder)["data_source"]["buffer"]]
        samples = [sample for group in buffer for sample in group]
        assert sum(sample.response_length > 0 for sample in samples) == next_folder["rollout/samples_continued"]
        assert {s.status for s in samples} >= {Sample.Status.ABORTED, Sample.Status.COMPLETED}
        for sample in samples:
            assert len(sample.weight_versions) == sample.response_length
            assert (sample.reward is None) == (sample.status is Sample.Status.ABORTED)
            assert (sample.metadata.get("start_rollout_id") is None) == (sample.response_length == 0)


def test_every_token_of_a_continued_sample_carries_its_own_version(runs):
    root = runs["whole"].result()
    found = 0
    for rollout_id in range(NUM_ROLLOUT):
        for sample in continued(trained(root, rollout_id)):
            found += 1
            versions = [int(version) for version in sample.weight_versions]
            assert versions == sorted(versions)
            assert versions[-1] == rollout_id, "the last token is this rollout's"
            assert versions[0] >= sample.metadata["start_rollout_id"]
            assert len(versions) == sample.response_length <= LONGEST
            assert len(sample.rollout_log_probs) == sample.response_length
            assert len(sample.rollout_routed_experts) == len(sample.tokens) - 1
            assert (sample.status is Sample.Status.TRUNCATED) <= (sample.response_length == LONGEST)
    assert found > 3


def test_parity_holds_on_the_tokens_of_the_current_version(runs):
    """Log-probs of tokens that older weights have sampled differ from the trainer's, and do not count."""
    rows = read_metrics(runs["whole"].result())
    assert all(row["train/train_rollout_logprob_abs_diff"] < 1e-5 for row in rows)
    assert all(row["train/logprob_diff_unexplained"] == 0 for row in rows)


def test_tokens_of_older_weights_are_hidden_from_the_loss_where_that_is_asked_for(runs):
    masked, plain = trained(runs["masked"].result(), 1), trained(runs["whole"].result(), 1)
    assert continued(masked)
    for sample in masked:
        mask = sample.loss_mask or [1] * sample.response_length
        assert mask == [int(version == "1") for version in sample.weight_versions]
    assert all(all(sample.loss_mask or [1]) for sample in plain)


def test_killed_and_resumed_is_the_run_that_was_never_killed(runs):
    whole, killed = runs["whole"].result(), runs["killed"].result()
    assert read_metrics(killed) == read_metrics(whole)
    assert_same_checkpoint(killed / "checkpoints" / LAST, whole / "checkpoints" / LAST)
