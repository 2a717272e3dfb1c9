from __future__ import annotations

import pytest
import torch

from lockstep.algorithms import sample_loss_weights, token_loss_weights


def test_each_rollout_weighs_the_same_and_siblings_share_one_mean():
    """Rollout a has 2 + 6 tokens, b has 4, c has 1; three rollouts."""
    weights = sample_loss_weights([2, 4, 6, 1], ["a", "b", "a", "c"])
    assert weights == pytest.approx([1 / 24, 1 / 12, 1 / 24, 1 / 3], rel=1e-15)


def test_per_token_loss_divides_by_all_trained_tokens():
    assert sample_loss_weights([2, 4, 6, 1], [0, 1, 0, 2], calculate_per_token_loss=True) == [1 / 13] * 4


def test_a_removed_sample_stays_in_the_number_of_rollouts():
    """As in slime: removing rollout 2 leaves the weights of the others as they were."""
    whole = sample_loss_weights([2, 4, 5], [0, 1, 2])
    without = sample_loss_weights([2, 4, 5], [0, 1, 2], removed=[False, False, True])
    assert without == [*whole[:2], 0.0]
    assert without == [1 / 6, 1 / 12, 0.0]


def test_a_removed_sibling_leaves_its_rollouts_mean_to_the_rest():
    assert sample_loss_weights([2, 6, 4], [0, 0, 1], removed=[False, True, False]) == [1 / 4, 0.0, 1 / 8]


def test_a_removed_samples_tokens_are_no_trained_tokens():
    weights = sample_loss_weights([2, 6, 4], [0, 1, 2], removed=[False, True, False], calculate_per_token_loss=True)
    assert weights == [1 / 6, 0.0, 1 / 6]


def test_a_rollout_without_trained_tokens_counts_as_a_rollout():
    assert sample_loss_weights([0, 4], [0, 1]) == [1 / 2, 1 / 8]
    assert sample_loss_weights([0, 0], [0, 1], calculate_per_token_loss=True) == [1.0, 1.0]


def test_an_empty_batch_has_no_weights():
    assert sample_loss_weights([], []) == []


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="2 token counts, 1 rollout ids and no removal marks"):
        sample_loss_weights([1, 2], [0])
    with pytest.raises(ValueError, match="1 removal marks"):
        sample_loss_weights([1, 2], [0, 1], removed=[True])


def test_tokens_get_their_samples_weight_where_the_mask_is_on():
    weights = token_loss_weights(
        torch.tensor([0.5, 0.25]), torch.tensor([0, 0, 1, 1]), torch.tensor([True, False, True, True])
    )
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.0, 0.25, 0.25]))
