from __future__ import annotations

import pytest
import torch

from lockstep.kernels.slots import Slots, collect, spread
from lockstep.kernels.swiglu import weighted_swiglu
from lockstep.kernels.top_k import top_k


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_rows_go_to_their_experts_and_come_back_summed(tokens: int) -> None:
    """Rows of one expert lie in the order of tokens; the last experts get none."""
    random = torch.Generator().manual_seed(0)
    chosen = torch.rand(tokens, 5, generator=random).topk(3).indices
    slots = Slots.of(chosen, 7)
    by_expert = sorted((int(expert), token) for token in range(tokens) for expert in chosen[token])
    x = torch.randn(tokens, 4, generator=random, dtype=torch.float64, requires_grad=True)
    rows = spread(x, slots)
    assert torch.equal(rows, x[[token for _, token in by_expert]])
    assert slots.ends_E.tolist() == [sum(e <= expert for e, _ in by_expert) for expert in range(7)]
    scale = torch.arange(1.0, len(rows) + 1, dtype=torch.float64)
    shares = torch.zeros(tokens, 1, dtype=torch.float64)
    for row, (_, token) in enumerate(by_expert):
        shares[token] += scale[row]
    back = collect(rows * scale.unsqueeze(1), slots)
    torch.testing.assert_close(back, x * shares, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(back.sum(), x)
    torch.testing.assert_close(gradient, shares.expand(-1, 4))


def test_a_slot_is_scaled_by_its_own_weight() -> None:
    slots = Slots.of(torch.tensor([[2, 0], [1, 2]]), 3)
    weights = torch.tensor([[2.0, 3.0], [5.0, 7.0]])
    scaled = weighted_swiglu(torch.ones(4, 2), weights, slots).squeeze(1) / torch.tensor(1.0).sigmoid()
    torch.testing.assert_close(scaled, torch.tensor([3.0, 5.0, 2.0, 7.0]))


def test_the_highest_scores_come_first() -> None:
    assert top_k(torch.tensor([[0.1, 0.5, 0.4], [0.7, 0.1, 0.2]]), 2).tolist() == [[1, 2], [0, 2]]
