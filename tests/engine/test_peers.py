"""Ranks that own some of the experts each sample together what each would sample with all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peer_ranks import NUM_REQUESTS, Way, run_rank
from torch.multiprocessing import start_processes

ALONE = Way("plain", has_peers=False)
WAYS = {
    "plain": Way("plain"),
    "ahead": Way("ahead"),
    "ahead, sizes for all": Way("ahead", graph_sizes=(64,)),
    "ahead, a size for none": Way("ahead", graph_sizes=None),
}


@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_with_half_of_the_experts_sample_what_each_does_with_all(
    rank: int, found: list[dict[str, Any]]
) -> None:
    """Tokens and experts equal; log-probs to 1e-5, as fp32 sums of two ranks' halves allow. Ranks have other numbers of
    requests, prefill and decode at other times, and only one of them needs wider tables."""
    wanted, *others = found[rank]["sampled"]
    assert len(wanted) == NUM_REQUESTS[rank]
    for name, got in zip(WAYS, others, strict=True):
        assert [g.token_ids for g in got] == [g.token_ids for g in wanted], name
        for ours, theirs in zip(got, wanted, strict=True):
            assert (ours.routed_experts == theirs.routed_experts).all(), name
            torch.testing.assert_close(torch.tensor(ours.log_probs), torch.tensor(theirs.log_probs), atol=1e-5, rtol=0)


def test_gathered_weights_are_the_divided_ones_and_take_no_memory_afterwards(found: list[dict[str, Any]]) -> None:
    for report in found:
        assert report["gathered"]["equal"] == [True, True]
        assert report["gathered"]["bytes"] == [0, 0]


def test_ranks_drop_their_graphs_together(found: list[dict[str, Any]]) -> None:
    """For a new table or a new weight of any of them: a rank that captured alone would wait for the other for ever."""
    first, second = (report["forgotten"] for report in found)
    assert first == second
    assert first[:2] == [0, 0], "nothing is captured there"
    assert all(count == 3 for count in first[2:]), "at the start, for rank 0's long request, for its new weight"


def test_rows_of_several_types_that_are_sent_together_arrive_as_they_were(found: list[dict[str, Any]]) -> None:
    for report in found:
        rows, ids, weights = report["exchanged"]
        assert rows.tolist() == [[1.5] * 3] * 2 + [[2.5] * 3] * 2
        assert ids.tolist() == [[511, 257], [-1, 2**40], [511, 257], [-1, 2**40 + 1]]
        assert torch.equal(weights, torch.tensor([[1 / 3]] * 2 + [[1 / 3 + 1]] * 2))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of each rank, what it sampled in every way, and what it gathered."""
    root = tmp_path_factory.mktemp("peers")
    start_processes(run_rank, args=(root, "cpu", [ALONE, *WAYS.values()]), nprocs=2, start_method="spawn")
    reports = [torch.load(root / f"rank_{rank}.pt", weights_only=False) for rank in range(2)]
    assert all(isinstance(report, dict) for report in reports), "\n".join(map(str, reports))
    return reports
