from __future__ import annotations

import pytest
import torch

from lockstep.parallel.mesh import Layout
from lockstep.parallel.rows import RankRows

LENGTHS = [7, 0, 30, 1, 12]


def rows_of_all(lengths: list[int], layout: Layout) -> list[RankRows]:
    """In rank order: context places, and the tensor places inside each."""
    places = [(cp, tp) for cp in range(layout.cp_size) for tp in range(layout.tp_size)]
    return [RankRows(lengths, layout, cp, tp, torch.device("cpu")) for cp, tp in places]


@pytest.mark.parametrize("lengths", [LENGTHS, [1], []])
@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 2), (4, 1), (2, 3)])
def test_ranks_hold_every_row_once_and_as_many_as_any_other(lengths: list[int], sizes: tuple[int, int]) -> None:
    layout = Layout(world_size=sizes[0] * sizes[1], cp_size=sizes[0], tp_size=sizes[1])
    ranks = rows_of_all(lengths, layout)
    held = torch.cat([rank.sequence_S for rank in ranks])
    assert held.sort().values.tolist() == list(range(ranks[0].num_rows))
    assert len({len(rank.sequence_S) for rank in ranks}) == 1
    assert len(ranks[0].sequence_S) >= 1, "a rank without rows would miss the exchanges"
    assert 0 <= ranks[0].num_rows - sum(lengths) <= layout.row_multiple


@pytest.mark.parametrize("cp_size", [2, 4])
def test_all_context_ranks_see_as_many_keys_of_a_long_document(cp_size: int) -> None:
    """Rows of a causal document see 1, 2, 3 ... keys: contiguous shares would differ by up to 2 cp - 1 times."""
    layout = Layout(world_size=cp_size, cp_size=cp_size)
    ranks = [RankRows([64], layout, cp, 0, torch.device("cpu")) for cp in range(cp_size)]
    assert len({int((rank.context_C + 1).sum()) for rank in ranks}) == 1


@pytest.mark.parametrize("cp_size", [1, 2, 3])
def test_segments_are_a_ranks_rows_with_the_keys_of_their_documents(cp_size: int) -> None:
    layout = Layout(world_size=cp_size, cp_size=cp_size)
    for rank in rows_of_all(LENGTHS, layout):
        document_of = torch.arange(len(rank.lengths)).repeat_interleave(torch.tensor(rank.lengths)).tolist()
        covered = []
        for segment in rank.segments:
            rows = rank.context_C[segment.first_row : segment.first_row + segment.num_rows].tolist()
            covered += rows
            keys = range(segment.first_key, segment.first_key + segment.num_keys)
            assert keys[-1] == rows[-1]
            assert keys[0] == document_of.index(document_of[rows[-1]])
            assert {document_of[row] for row in rows} == {document_of[rows[-1]]}
        assert covered == rank.context_C.tolist()


def test_places_and_orders_lead_back_to_the_pack() -> None:
    layout = Layout(world_size=3, cp_size=3)
    ranks = rows_of_all(LENGTHS, layout)
    for rank in ranks:
        gathered = torch.cat([other.context_C for other in ranks])
        assert gathered[rank.pack_order_T].tolist() == list(range(rank.num_rows))
        assert gathered.tolist() == rank.rank_order_T.tolist()
        mine = rank.place_T >= 0
        assert rank.context_C[rank.place_T[mine]].tolist() == mine.nonzero().squeeze(1).tolist()
