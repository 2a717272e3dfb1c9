from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.algorithms import group_relative_advantages, make_advantage_estimator, whiten_advantages
from lockstep.errors import OptionError


def reference(rewards: list[float], group_ids: list[int], *, divide_by_std: bool = True) -> np.ndarray:
    advantages = np.zeros(len(rewards))
    for i, group_id in enumerate(group_ids):
        members = np.array([r for r, g in zip(rewards, group_ids, strict=True) if g == group_id], dtype=np.float64)
        advantages[i] = rewards[i] - members.mean()
        if divide_by_std:
            advantages[i] /= members.std(ddof=1) + 1e-6
    return advantages


ragged_groups = st.lists(
    st.lists(st.integers(-8, 8).map(lambda n: n / 4), min_size=2, max_size=5), min_size=1, max_size=5
)


@settings(derandomize=True, deadline=None)
@given(groups=ragged_groups, divide_by_std=st.booleans(), order=st.randoms(use_true_random=False))
def test_ragged_groups_in_any_order_are_centred_one_by_one(groups, divide_by_std, order):
    rows = [(reward, 7 - 3 * index) for index, group in enumerate(groups) for reward in group]
    order.shuffle(rows)
    rewards, group_ids = [row[0] for row in rows], [row[1] for row in rows]
    actual = group_relative_advantages(torch.tensor(rewards), torch.tensor(group_ids), divide_by_std=divide_by_std)
    expected = reference(rewards, group_ids, divide_by_std=divide_by_std)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-6, atol=1e-6)


def test_one_right_answer_in_four_by_hand():
    """Mean 1/4, unbiased std 1/2."""
    advantages = group_relative_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(advantages, torch.tensor([1.5, -0.5, -0.5, -0.5]), rtol=0, atol=4e-6)


@pytest.mark.parametrize("reward", [0.1, 1.0, -3.3])
def test_an_all_equal_group_has_no_advantage(reward):
    rewards, groups = torch.full((7,), reward), torch.zeros(7, dtype=torch.long)
    torch.testing.assert_close(group_relative_advantages(rewards, groups), torch.zeros(7), rtol=0, atol=1e-8)


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="1 of 2 groups"):
        group_relative_advantages(torch.ones(3), torch.tensor([0, 0, 1]))


@pytest.mark.parametrize("raw", [False, True])
def test_a_reward_that_is_not_finite_is_refused(raw):
    estimate = make_advantage_estimator("grpo", disable_rewards_normalization=raw)
    with pytest.raises(ValueError, match="1 of 3 rewards are not finite, the first at position 1"):
        estimate(torch.tensor([0.0, float("nan"), 1.0]), torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_options_choose_the_estimator(name):
    rewards, groups = [3.0, 1.0, 2.0, 5.0, 5.0], [1, 1, 1, 0, 0]
    tensors = torch.tensor(rewards), torch.tensor(groups)
    np.testing.assert_allclose(make_advantage_estimator(name)(*tensors), reference(rewards, groups), rtol=1e-6)
    without_std = make_advantage_estimator(name, disable_grpo_std_normalization=True)
    np.testing.assert_allclose(without_std(*tensors), [1.0, -1.0, 0.0, 0.0, 0.0], rtol=1e-6)
    raw = make_advantage_estimator(name, disable_rewards_normalization=True)
    np.testing.assert_array_equal(raw(*tensors), rewards)


def test_an_unknown_estimator_is_an_option_error():
    with pytest.raises(OptionError, match="--advantage-estimator is 'ppo'"):
        make_advantage_estimator("ppo")


def test_whitening_counts_a_sample_once_per_trained_token():
    advantages, num_tokens = [1.0, -2.0, 0.5, 9.0], [3, 1, 2, 0]
    tokens = np.repeat(advantages, num_tokens)
    expected = (np.array(advantages) - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + 1e-8)
    actual = whiten_advantages(torch.tensor(advantages), torch.tensor(num_tokens))
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-6)


def test_whitening_nothing_is_refused():
    with pytest.raises(ValueError, match="num_loss_tokens is 0"):
        whiten_advantages(torch.ones(2), torch.zeros(2))
