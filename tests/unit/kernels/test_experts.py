from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lockstep.kernels.experts import experts_reference, grouped_experts

TOKENS, WIDTH, INNER, EXPERTS = 9, 8, 12, 5


def inputs(routes: str) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, WIDTH, generator=draw, requires_grad=True)
    weights = torch.rand(TOKENS, 2, generator=draw, requires_grad=True)
    gate_up = torch.randn(EXPERTS, 2 * INNER, WIDTH, generator=draw, requires_grad=True)
    down = torch.randn(EXPERTS, WIDTH, INNER, generator=draw, requires_grad=True)
    chosen = {
        "mixed": torch.stack([torch.randperm(EXPERTS, generator=draw)[:2] for _ in range(TOKENS)]),
        "all to two": torch.tensor([[3, 1]] * TOKENS),
        "none to the first and last": torch.tensor([[1, 2], [2, 3], [3, 1]] * 3),
    }[routes]
    return x, chosen, weights, gate_up, down


def naive(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    rows = []
    for t in range(len(x)):
        row = torch.zeros(x.shape[1])
        for slot, expert in enumerate(chosen[t].tolist()):
            gate, up = gate_up[expert, :INNER] @ x[t], gate_up[expert, INNER:] @ x[t]
            row = row + weights[t, slot] * (down[expert] @ (gate * torch.sigmoid(gate) * up))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("routes", ["mixed", "all to two", "none to the first and last"])
@pytest.mark.parametrize("kernel", [experts_reference, grouped_experts])
def test_values_and_gradients_are_those_of_each_token_through_its_experts(kernel: object, routes: str) -> None:
    x, chosen, weights, gate_up, down = inputs(routes)
    upstream = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    leaves = (x, weights, gate_up, down)
    wanted = naive(x, chosen, weights, gate_up, down)
    got = kernel(x, chosen, weights, gate_up, down)  # type: ignore[operator]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(
        torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(wanted, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_a_token_alone_and_in_a_crowd_gets_the_same_bits() -> None:
    """Slots are summed in the router's order, whoever else chose the experts."""
    x, chosen, weights, gate_up, down = inputs("mixed")
    crowd = grouped_experts(x, chosen, weights, gate_up, down)
    repeated = grouped_experts(x, chosen, weights, gate_up, down)
    assert torch.equal(crowd, repeated)
    alone = torch.cat(
        [grouped_experts(x[t : t + 1], chosen[t : t + 1], weights[t : t + 1], gate_up, down) for t in range(TOKENS)]
    )
    torch.testing.assert_close(crowd, alone, rtol=1e-5, atol=1e-5)
