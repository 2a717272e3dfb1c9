"""`--normalize-advantages`: whitened over the tokens that the loss sees."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from lockstep.algorithms import make_advantage_estimator
from lockstep.training_data import make_training_data
from lockstep.types import Sample

MASKS = [[1, 1, 1], [1], [1, 0, 1, 1], [1, 1]]
REWARDS = [1.0, 0.0, 5.0, 3.0]


def advantages(*, normalize: bool, removed: tuple[int, ...] = (), post_process=None) -> list[float]:
    samples = [
        Sample(
            index=i,
            rollout_id=i,
            tokens=[0] * (2 + len(mask)),
            response_length=len(mask),
            loss_mask=mask,
            reward=reward,
            remove_sample=i in removed,
        )
        for i, (mask, reward) in enumerate(zip(MASKS, REWARDS, strict=True))
    ]
    args = SimpleNamespace(
        reward_key=None,
        calculate_per_token_loss=False,
        normalize_advantages=normalize,
        use_tis=False,
        use_rollout_logprobs=False,
        get_mismatch_metrics=False,
    )
    estimator = make_advantage_estimator("grpo", disable_grpo_std_normalization=True)
    data = make_training_data([samples[:2], samples[2:]], args, estimator, post_process, num_steps=1)
    return [sample.advantage for sample in data.train_samples]


def whitened(values: list[float], counts: list[int]) -> list[float]:
    """Written out token by token."""
    tokens = [value for value, count in zip(values, counts, strict=True) for _ in range(count)]
    mean = sum(tokens) / len(tokens)
    variance = sum((token - mean) ** 2 for token in tokens) / (len(tokens) - 1)
    return [(value - mean) / math.sqrt(variance + 1e-8) for value in values]


def test_without_it_the_estimator_speaks():
    assert advantages(normalize=False) == [0.5, -0.5, 1.0, -1.0]


def test_every_trained_token_counts_once():
    assert advantages(normalize=True) == pytest.approx(whitened([0.5, -0.5, 1.0, -1.0], [3, 1, 3, 2]))


def test_removed_samples_do_not_count():
    assert advantages(normalize=True, removed=(2,)) == pytest.approx(whitened([0.5, -0.5, 1.0, -1.0], [3, 1, 0, 2]))


def test_rewards_of_the_users_own_normalisation_are_whitened_too():
    own = advantages(normalize=True, post_process=lambda args, samples: ([0.0] * 4, [4, 3, 2, 1]))
    assert own == pytest.approx(whitened([4, 3, 2, 1], [3, 1, 3, 2]))


def test_where_the_loss_sees_nothing_nothing_changes():
    assert advantages(normalize=True, removed=(0, 1, 2, 3)) == [0.5, -0.5, 1.0, -1.0]
