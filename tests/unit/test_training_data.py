from __future__ import annotations

from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.algorithms import make_advantage_estimator
from lockstep.errors import RolloutError
from lockstep.training_data import TrainingData, make_training_data
from lockstep.types import Sample

GRPO = make_advantage_estimator()
READS_ROLLOUT_LOG_PROBS = ("use_tis", "use_rollout_logprobs", "get_mismatch_metrics")


def sample(index: int, reward: float = 0.0, response_length: int = 3, **fields: Any) -> Sample:
    defaults = {"rollout_id": index, "tokens": [1, 2, *range(10, 10 + response_length)]}
    return Sample(index=index, reward=reward, response_length=response_length, **(defaults | fields))


def args(**changes: Any) -> Any:
    switches = ("calculate_per_token_loss", "normalize_advantages", *READS_ROLLOUT_LOG_PROBS)
    defaults = dict.fromkeys(switches, False) | {"reward_key": None}
    return SimpleNamespace(**(defaults | changes))


def data_of(groups: list[list[Sample]], num_steps: int = 1, estimator: Any = GRPO, **changes: Any) -> TrainingData:
    return make_training_data(groups, args(**changes), estimator, num_steps=num_steps)


def test_uneven_groups_are_centred_one_by_one() -> None:
    groups = [
        [sample(0, 1.0), sample(1, 0.0)],
        [sample(2, 1.0), sample(3, 1.0), sample(4, 1.0)],
        [sample(5, 2.0), sample(6, 3.0), sample(7, 7.0)],
    ]
    last = np.array([2.0, 3.0, 7.0])
    wanted = [2**-0.5, -(2**-0.5), 0, 0, 0, *((last - 4) / last.std(ddof=1))]
    assert [s.advantage for s in data_of(groups).train_samples] == pytest.approx(wanted, abs=1e-5)


def test_a_removed_sample_counts_in_its_groups_mean_but_not_in_the_loss() -> None:
    """And its rollout stays in the denominator: the others weigh what they would weigh beside it."""
    groups = [[sample(0, 0.0), sample(1, 3.0, remove_sample=True)], [sample(2, 1.0), sample(3, 1.0)]]
    data = data_of(groups)
    assert data.train_samples[0].advantage == pytest.approx(-(2**-0.5), abs=1e-5)
    assert [s.loss_weight for s in data.train_samples] == pytest.approx([1 / 12, 0, 1 / 12, 1 / 12])


def test_branches_of_one_rollout_share_one_mean() -> None:
    groups = [[sample(0, 1.0, 4), sample(1, 0.0, 2, rollout_id=9), sample(2, 0.0, 6, rollout_id=9)]]
    weights = [s.loss_weight for s in data_of(groups).train_samples]
    assert weights == pytest.approx([1 / (2 * 4), 1 / (2 * 8), 1 / (2 * 8)])


def test_a_removed_branch_leaves_its_rollouts_mean_to_the_others() -> None:
    groups = [[sample(0, 1.0, 4), sample(1, 0.0, 2, rollout_id=9), sample(2, 0.0, 6, rollout_id=9, remove_sample=True)]]
    assert [s.loss_weight for s in data_of(groups).train_samples] == pytest.approx([1 / (2 * 4), 1 / (2 * 2), 0])
    weights = [s.loss_weight for s in data_of(groups, calculate_per_token_loss=True).train_samples]
    assert weights == pytest.approx([1 / 6, 1 / 6, 0])


def test_masked_tokens_are_in_no_denominator() -> None:
    groups = [[sample(0, 1.0, 4, loss_mask=[1, 0, 0, 1]), sample(1, 0.0, 2)]]
    assert [s.loss_weight for s in data_of(groups).train_samples] == pytest.approx([1 / 4, 1 / 4])
    weights = [s.loss_weight for s in data_of(groups, calculate_per_token_loss=True).train_samples]
    assert weights == pytest.approx([1 / 4, 1 / 4])


def test_per_token_loss_weighs_every_trained_token_of_the_step_alike() -> None:
    groups = [[sample(0, 1.0, 4), sample(1, 0.0, 1)], [sample(2, 1.0, 2), sample(3, 0.0, 3)]]
    first, second = data_of(groups, num_steps=2, calculate_per_token_loss=True).steps
    assert [s.loss_weight for s in first] == pytest.approx([1 / 5] * 2)
    assert [s.loss_weight for s in second] == pytest.approx([1 / 5] * 2)


def test_samples_without_a_rollout_id_are_rollouts_of_their_own() -> None:
    """`rollout_id` defaults to `index`: a custom data source may leave it out."""
    groups = [[sample(i, float(i), rollout_id=None) for i in range(4)]]
    data = data_of(groups, num_steps=2)
    assert [s.loss_weight for s in data.train_samples] == pytest.approx([1 / (3 * 2)] * 4)
    assert [len(step) for step in data.steps] == [2, 2]


def test_branches_without_a_rollout_id_are_one_rollout_by_their_sample_index() -> None:
    groups = [
        [sample(0, 1.0, 4, rollout_id=None), sample(7, 0.0, 2, rollout_id=None), sample(7, 0.0, 6, rollout_id=None)]
    ]
    weights = [s.loss_weight for s in data_of(groups).train_samples]
    assert weights == pytest.approx([1 / (2 * 4), 1 / (2 * 8), 1 / (2 * 8)])


def test_branches_that_do_not_stand_side_by_side_stay_in_one_step() -> None:
    groups = [[sample(0, 1.0), sample(1, 0.0), sample(2, 0.0, rollout_id=0)], [sample(3, 1.0), sample(4, 0.0)]]
    for member in groups[0] + groups[1]:
        member.tokens[0] = member.index or 0
    data = data_of(groups, num_steps=2)
    assert [[sample.tokens[0] for sample in step] for step in data.steps] == [[0, 1, 2], [3, 4]]


def test_a_single_step_holds_the_samples_in_the_order_of_the_rollout() -> None:
    """Its log-probs are read beside the samples of the rollout, wherever branches stand."""
    groups = [[sample(0, 1.0), sample(1, 0.0), sample(2, 0.0, rollout_id=0)], [sample(3, 1.0), sample(4, 0.0)]]
    data = data_of(groups)
    assert all(a is b for a, b in zip(data.steps[0], data.train_samples, strict=True))


@pytest.mark.parametrize("rewards", [[1.0], [1.0, float("nan")]])
def test_what_a_rollout_function_or_a_file_brought_without_advantage_is_refused(rewards: list[float]) -> None:
    groups = [[sample(i, reward) for i, reward in enumerate(rewards)]]
    with pytest.raises(RolloutError, match=r"single sample|not finite") as raised:
        data_of(groups)
    assert raised.value.remedy


GROUPS = st.lists(st.lists(st.integers(1, 3), min_size=2, max_size=5), min_size=1, max_size=6)


@given(GROUPS, st.integers(1, 5), st.data())
def test_steps_lose_nothing_and_split_no_rollout(shape: list[list[int]], num_steps: int, data: Any) -> None:
    """Each number is a rollout with that many branches, which may stand anywhere in its group."""
    ids, rollouts = count(), count()
    groups = []
    for branches in shape:
        group = [
            sample(next(ids), float(i), rollout_id=rollout_id)
            for i, size in enumerate(branches)
            for rollout_id in [next(rollouts)] * size
        ]
        groups.append(data.draw(st.permutations(group)))
    made = data_of(groups, num_steps=num_steps)
    of_sample = {id(t): s.rollout_id for t, s in zip(made.train_samples, made.samples, strict=True)}
    assert sorted(id(s) for step in made.steps for s in step) == sorted(map(id, made.train_samples))
    rollouts_of_step = [{of_sample[id(s)] for s in step} for step in made.steps]
    assert sum(map(len, rollouts_of_step)) == len(set(of_sample.values()))
    assert all(rollouts_of_step)
    sizes = [len(r) for r in rollouts_of_step]
    assert len(sizes) == min(num_steps, len(set(of_sample.values())))
    assert max(sizes) - min(sizes) <= 1
    for step in made.steps:
        assert sum(s.loss_weight * sum(s.loss_mask) for s in step) == pytest.approx(1.0)


def test_the_users_post_processing_replaces_the_estimator() -> None:
    groups = [[sample(0, 1.0), sample(1, 0.0)]]
    made = make_training_data(groups, args(), GRPO, lambda args, samples: ([0.0, 0.0], [5.0, -7.0]), num_steps=1)
    assert [s.advantage for s in made.train_samples] == [5.0, -7.0]


def test_a_reward_in_a_dict_is_read_by_its_key() -> None:
    groups = [[sample(0, reward={"score": 1.0, "other": 9.0}), sample(1, reward={"score": 0.0, "other": 0.0})]]  # type: ignore[arg-type]
    advantages = [s.advantage for s in data_of(groups, reward_key="score").train_samples]
    assert advantages == pytest.approx([2**-0.5, -(2**-0.5)], abs=1e-5)


def test_what_the_sampler_recorded_reaches_the_trainer() -> None:
    routes = np.zeros((4, 1, 2), dtype=np.int16)
    recorded = sample(
        0,
        1.0,
        3,
        loss_mask=[1, 0, 1],
        rollout_log_probs=[-1.0, 0.0, -2.0],
        rollout_top_p_token_ids=[10, 11, 12],
        rollout_top_p_token_offsets=[0, 2, 2, 3],
        rollout_routed_experts=routes,
    )
    got = data_of([[recorded, sample(1)]]).train_samples[0]
    assert (got.tokens, got.response_length, got.loss_mask) == ([1, 2, 10, 11, 12], 3, [1, 0, 1])
    assert got.rollout_log_probs == [-1.0, 0.0, -2.0]
    assert (got.kept_token_ids, got.kept_token_offsets) == ([10, 11, 12], [0, 2, 2, 3])
    assert got.routed_experts is routes


INCONSISTENT = {
    "no response": {"response_length": 0},
    "no prompt": {"tokens": [10, 11, 12]},
    "short mask": {"loss_mask": [1, 1]},
    "long mask": {"loss_mask": [1, 1, 1, 1]},
    "short log-probs": {"rollout_log_probs": [0.0, 0.0]},
    "short nucleus": {"rollout_top_p_token_ids": [10], "rollout_top_p_token_offsets": [0, 1, 1, 1, 1]},
    "nucleus beyond its tokens": {"rollout_top_p_token_ids": [10], "rollout_top_p_token_offsets": [0, 1, 1, 2]},
    "nucleus without borders": {"rollout_top_p_token_ids": [10]},
    "too many routes": {"rollout_routed_experts": np.zeros((9, 1, 2))},
}


@pytest.mark.parametrize("fields", INCONSISTENT.values(), ids=INCONSISTENT.keys())
def test_an_inconsistent_sample_is_refused_by_its_number(fields: dict[str, Any]) -> None:
    with pytest.raises(RolloutError) as raised:
        data_of([[sample(0, 1.0), sample(17, 0.0, **fields)]])
    assert raised.value.field == "sample 17"
    assert raised.value.remedy


@pytest.mark.parametrize("option", READS_ROLLOUT_LOG_PROBS)
def test_a_sample_without_the_log_probs_that_the_loss_reads_is_refused_by_its_number(option: str) -> None:
    complete = sample(0, 1.0, rollout_log_probs=[-1.0] * 3)
    with pytest.raises(RolloutError, match="no rollout_log_probs") as raised:
        data_of([[complete, sample(17)]], **{option: True})
    assert raised.value.field == "sample 17"
    data_of([[complete, sample(17, rollout_log_probs=[-1.0] * 3)]], **{option: True})
