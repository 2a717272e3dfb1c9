from __future__ import annotations

import random

import pytest

from lockstep.trainer.batch import pack_by_tokens
from lockstep.trainer.parallel import deal_micro_batches


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_every_rank_gets_as_many_micro_batches_and_every_sample_is_in_one(num_ranks: int) -> None:
    draw = random.Random(0)
    lengths = [draw.randrange(1, 60) for _ in range(37)]
    bins = pack_by_tokens(lengths, 64)
    dealt = deal_micro_batches(bins, lengths, num_ranks)
    assert {len(of_rank) for of_rank in dealt} == {-(-len(bins) // num_ranks)}
    assert sorted(i for of_rank in dealt for members in of_rank for i in members) == list(range(37))


def test_micro_batches_of_the_same_time_are_of_similar_size() -> None:
    lengths = [10, 90, 20, 80, 30, 70]
    dealt = deal_micro_batches([[i] for i in range(6)], lengths, 2)
    together = [[lengths[of_rank[time][0]] for of_rank in dealt] for time in range(3)]
    assert together == [[90, 80], [30, 70], [20, 10]]


def test_ranks_without_samples_get_empty_micro_batches() -> None:
    assert deal_micro_batches([[0, 1]], [5, 5], 3) == [[[0, 1]], [[]], [[]]]
