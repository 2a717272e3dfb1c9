"""What ranks add up for each other's rows is what one rank with all experts computes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from lockstep.kernels.experts import experts_reference, local_experts

NUM_EXPERTS, WIDTH, INNER, SLOTS = 7, 16, 8, 3


@pytest.fixture
def inputs() -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    x_GD = torch.randn(11, WIDTH, generator=draw)
    experts_GS = torch.stack([torch.randperm(NUM_EXPERTS, generator=draw)[:SLOTS] for _ in x_GD])
    weights_GS = torch.rand(11, SLOTS, generator=draw)
    gate_up_EJD = torch.randn(NUM_EXPERTS, 2 * INNER, WIDTH, generator=draw)
    return x_GD, experts_GS, weights_GS, gate_up_EJD, torch.randn(NUM_EXPERTS, WIDTH, INNER, generator=draw)


@pytest.mark.parametrize("borders", [[0, 7], [0, 3, 7], [0, 4, 4, 7]])
def test_parts_of_ranks_add_up_to_all_experts(inputs: tuple[torch.Tensor, ...], borders: list[int]) -> None:
    """Also where a rank owns no expert at all."""
    x_GD, experts_GS, weights_GS, gate_up_EJD, down_EDI = inputs
    total_GD = torch.zeros_like(x_GD)
    for first, end in pairwise(borders):
        here_GS = experts_GS - first
        total_GD += local_experts(x_GD, here_GS, weights_GS, gate_up_EJD[first:end], down_EDI[first:end], torch.float32)
    # fp32 sums of 16 and 8 products of size 1, weighed and added in another order.
    torch.testing.assert_close(total_GD, experts_reference(*inputs), rtol=1e-5, atol=1e-5)


def test_rows_that_visit_nobody_here_get_nothing(inputs: tuple[torch.Tensor, ...]) -> None:
    x_GD, experts_GS, weights_GS, gate_up_EJD, down_EDI = inputs
    nobody_GS = torch.full_like(experts_GS, NUM_EXPERTS)
    nobody_GS[0] = experts_GS[0]
    found_GD = local_experts(x_GD.fill_(1e30), nobody_GS, weights_GS, gate_up_EJD, down_EDI, torch.float32)
    assert bool((found_GD[0] != 0).any())
    assert torch.equal(found_GD[1:], torch.zeros_like(found_GD[1:]))
