from __future__ import annotations

import pytest
import torch

from lockstep.kernels.decode_experts import decode_experts
from lockstep.kernels.experts import experts_reference

TOKENS, EXPERTS, SLOTS, WIDTH, INNER = 6, 5, 2, 8, 16


def inputs(width: int = WIDTH) -> tuple[torch.Tensor, ...]:
    """Of a width of 7 numbers no grouped product can be made: then the specification runs."""
    draw = torch.Generator().manual_seed(0)
    chosen = torch.rand(TOKENS, EXPERTS, generator=draw).topk(SLOTS).indices
    shapes = [(TOKENS, width), (TOKENS, SLOTS), (EXPERTS, 2 * INNER, width), (EXPERTS, width, INNER)]
    x, weights, gate_up, down = (torch.randn(shape, generator=draw, dtype=torch.float32) for shape in shapes)
    return x, chosen, weights, gate_up, down


@pytest.mark.parametrize("width", [WIDTH, 7])
def test_a_token_gets_the_weighted_sum_of_its_experts(width: int) -> None:
    got, wanted = decode_experts(*inputs(width)), experts_reference(*inputs(width))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("width", [WIDTH, 7])
def test_slots_of_experts_that_are_elsewhere_count_nothing(width: int) -> None:
    x, chosen, weights, gate_up, down = inputs(width)
    whole = decode_experts(x, chosen, weights, gate_up, down)
    parts = [
        decode_experts(x, chosen - first, weights, gate_up[first:end], down[first:end])
        for first, end in ((0, 2), (2, EXPERTS))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-5, atol=1e-4)
    assert not decode_experts(x, torch.full_like(chosen, EXPERTS), weights, gate_up, down).any()


def test_the_sum_may_stay_unrounded() -> None:
    x, chosen, weights, gate_up, down = (t if t.dtype == torch.int64 else t.bfloat16() for t in inputs())
    unrounded = decode_experts(x, chosen, weights, gate_up, down, torch.float32)
    assert unrounded.dtype == torch.float32
    assert torch.equal(unrounded.bfloat16(), decode_experts(x, chosen, weights, gate_up, down))
    assert not torch.equal(unrounded.bfloat16().float(), unrounded)
