from __future__ import annotations

import torch

from lockstep.kernels.decode_linears import linears, swiglu_linear


def test_several_linear_layers_of_one_input() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, generator=draw, dtype=torch.float64)
    weights = [torch.randn(size, 8, generator=draw, dtype=torch.float64) for size in (5, 4, 1)]
    for got, weight in zip(linears(x, weights), weights, strict=True):
        torch.testing.assert_close(got, torch.einsum("td,od->to", x, weight))
    gate, up = torch.einsum("td,od->to", x, weights[0]), torch.einsum("td,od->to", x, 2 * weights[0])
    torch.testing.assert_close(swiglu_linear(x, weights[0], 2 * weights[0]), gate / (1 + (-gate).exp()) * up)
