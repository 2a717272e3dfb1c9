from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lockstep.trainer.batch import MicroBatch, TrainSample, pack_by_count, pack_by_tokens

LENGTHS = st.lists(st.integers(1, 50), max_size=40)


@given(LENGTHS, st.integers(1, 80))
def test_packing_holds_every_sample_once_and_no_bin_over_budget_but_for_a_single_long_sample(
    lengths: list[int], max_tokens: int
) -> None:
    bins = pack_by_tokens(lengths, max_tokens)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    assert all(members and members == sorted(members) for members in bins)
    assert all(sum(lengths[i] for i in members) <= max_tokens or len(members) == 1 for members in bins)


@given(LENGTHS, st.integers(50, 80))
def test_packing_needs_at_most_twice_the_bins_that_tokens_alone_ask_for(lengths: list[int], max_tokens: int) -> None:
    """No two bins are half empty together: the second's samples would have fitted into the first."""
    assert len(pack_by_tokens(lengths, max_tokens)) <= 2 * -(-sum(lengths) // max_tokens)


@given(st.integers(0, 30), st.integers(1, 9))
def test_packing_by_count_keeps_the_order(num_samples: int, size: int) -> None:
    bins = pack_by_count(num_samples, size)
    assert [index for members in bins for index in members] == list(range(num_samples))
    assert all(len(members) == size for members in bins[:-1])


def sample(tokens: list[int], response_length: int, **fields: object) -> TrainSample:
    defaults = {"loss_mask": [1] * response_length, "rollout_log_probs": [-0.5 * i for i in range(response_length)]}
    return TrainSample(tokens=tokens, response_length=response_length, **(defaults | fields))  # type: ignore[arg-type]


def build(*samples: TrainSample) -> MicroBatch:
    return MicroBatch.build(samples, torch.device("cpu"))


def test_each_response_token_is_predicted_by_the_row_before_it() -> None:
    batch = build(sample([10, 11, 12, 13], 2, loss_weight=0.5, advantage=3.0), sample([20, 21], 1, loss_weight=2.0))
    assert batch.input_ids_T.tolist() == [10, 11, 12, 13, 20, 21]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 0, 1]
    assert batch.rows_R.tolist() == [1, 2, 4]
    assert batch.targets_R.tolist() == [12, 13, 21]
    assert batch.sample_ids_R.tolist() == [0, 0, 1]
    assert batch.loss_weights_R.tolist() == [0.5, 0.5, 2.0]
    assert batch.advantages_R.tolist() == [3.0, 3.0, 0.0]
    assert batch.rollout_log_probs_R is not None
    assert batch.rollout_log_probs_R.tolist() == [0.0, -0.5, 0.0]


def test_masked_tokens_weigh_nothing() -> None:
    batch = build(sample([1, 2, 3, 4], 3, loss_mask=[1, 0, 1], loss_weight=0.25))
    assert batch.loss_mask_R.tolist() == [True, False, True]
    assert batch.loss_weights_R.tolist() == [0.25, 0.0, 0.25]


def test_a_sample_without_recorded_nuclei_keeps_the_whole_vocabulary_beside_one_with() -> None:
    batch = build(
        sample([1, 2, 3], 2),
        sample([4, 5, 6], 2, kept_token_ids=[7, 8, 9], kept_token_offsets=[0, 2, 3]),
    )
    assert batch.kept is not None
    assert batch.kept.token_ids_N.tolist() == [7, 8, 9]
    assert batch.kept.offsets_R1.tolist() == [0, 0, 0, 2, 3]
    assert build(sample([1, 2, 3], 2)).kept is None


def test_what_one_sample_lacks_the_batch_lacks() -> None:
    with_old, without = sample([1, 2, 3], 2, old_log_probs=torch.tensor([1.0, 2.0])), sample([4, 5], 1)
    assert build(with_old, without).old_log_probs_R is None
    batch = build(with_old, with_old)
    assert batch.old_log_probs_R is not None
    assert batch.old_log_probs_R.tolist() == [1.0, 2.0, 1.0, 2.0]


def test_recorded_routes_end_with_a_gap_where_the_sampler_computed_nothing() -> None:
    routes = np.arange(4).reshape(2, 1, 2)
    batch = build(sample([1, 2, 3], 1, routed_experts=routes), sample([4, 5], 1, routed_experts=routes[:1]))
    assert batch.routed_experts_TLS is not None
    assert batch.routed_experts_TLS[:, 0].tolist() == [[0, 1], [2, 3], [-1, -1], [0, 1], [-1, -1]]


def test_a_sample_without_recorded_routes_does_not_take_its_neighbours_record_away() -> None:
    routes = np.arange(4).reshape(2, 1, 2)
    batch = build(sample([4, 5], 1), sample([1, 2, 3], 1, routed_experts=routes))
    assert batch.routed_experts_TLS is not None
    assert batch.routed_experts_TLS[:, 0].tolist() == [[-1, -1], [-1, -1], [0, 1], [2, 3], [-1, -1]]
    assert build(sample([4, 5], 1)).routed_experts_TLS is None
