from __future__ import annotations

import torch

from lockstep.kernels.decode_linears import linears, slot_weights, swiglu_linear


def test_several_linear_layers_of_one_input() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, generator=draw, dtype=torch.float64)
    weights = [torch.randn(size, 8, generator=draw, dtype=torch.float64) for size in (5, 4, 1)]
    for got, weight in zip(linears(x, weights), weights, strict=True):
        torch.testing.assert_close(got, torch.einsum("td,od->to", x, weight))
    gate, up = torch.einsum("td,od->to", x, weights[0]), torch.einsum("td,od->to", x, 2 * weights[0])
    torch.testing.assert_close(swiglu_linear(x, weights[0], 2 * weights[0]), gate / (1 + (-gate).exp()) * up)


def test_a_slots_weight_is_its_experts_probability_over_those_of_all_chosen() -> None:
    probs = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]])
    chosen = torch.tensor([[0, 2], [3, 1]])
    torch.testing.assert_close(
        slot_weights(probs, chosen, True, torch.float32), torch.tensor([[0.8, 0.2], [2 / 3, 1 / 3]])
    )
    plain = slot_weights(probs, chosen, False, torch.bfloat16)
    assert plain.dtype == torch.bfloat16
    assert plain[0].tolist() == [0.5, 0.125]
