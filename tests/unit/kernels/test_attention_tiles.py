"""The tables of Triton's attention kernels: they are what says which scores exist."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lockstep.kernels.attention import Tiles

documents = st.lists(
    st.tuples(st.integers(0, 13), st.integers(0, 9)).map(lambda pair: (pair[0], sum(pair))), min_size=1, max_size=5
)
"""(queries, keys) of each: at least as many keys as queries."""


def seen(documents: list[tuple[int, int]]) -> Tensor:
    """Which key (column) every query (row) sees: its document's queries are the last of its keys."""
    blocks = [torch.ones(queries, keys).tril(keys - queries) for queries, keys in documents]
    return torch.block_diag(*blocks)


def tiles_of(documents: list[tuple[int, int]]) -> Tiles:
    return Tiles([q for q, _ in documents], [k for _, k in documents], torch.device("cpu"))


@given(documents, st.integers(1, 5))
def test_tiles_of_queries_are_all_scores_once(documents: list[tuple[int, int]], size: int) -> None:
    got = torch.zeros_like(seen(documents))
    for first_query, end_query, first_key, position in tiles_of(documents).of_queries(size).tolist():
        for row in range(first_query, min(first_query + size, end_query)):
            got[row, first_key : first_key + position + row - first_query + 1] += 1
    torch.testing.assert_close(got, seen(documents))


@given(documents, st.integers(1, 5))
def test_tiles_of_keys_are_all_scores_once(documents: list[tuple[int, int]], size: int) -> None:
    got = torch.zeros_like(seen(documents))
    for first_key, end_key, first_query, end_query, behind in tiles_of(documents).of_keys(size).tolist():
        for row in range(first_query, end_query):
            got[row, first_key : min(end_key, first_key + size, first_key + behind + row - first_query + 1)] += 1
    torch.testing.assert_close(got, seen(documents))


@given(documents, st.integers(1, 5))
def test_every_key_has_a_tile_that_writes_its_gradient(documents: list[tuple[int, int]], size: int) -> None:
    written = torch.zeros(sum(keys for _, keys in documents))
    for first_key, end_key, *_ in tiles_of(documents).of_keys(size).tolist():
        written[first_key : min(end_key, first_key + size)] += 1
    assert (written == 1).all()


def test_the_longest_tiles_come_first() -> None:
    tiles = tiles_of([(5, 5), (9, 9), (2, 12)])
    assert tiles.of_queries(4)[:, 3].tolist() == [10, 8, 4, 4, 0, 0]
    assert (tiles.of_keys(4)[:, 3] - tiles.of_keys(4)[:, 2]).tolist() == [9, 5, 5, 2, 2, 2, 1, 1]
