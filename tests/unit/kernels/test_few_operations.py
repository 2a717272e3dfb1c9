"""What a CPU's decoding step computes in fewer operations is what the separate operations compute.

fp32 sums of at most 64 numbers of size 1 round by less than 1e-6; tolerances leave a factor for scale.
"""

from __future__ import annotations

import pytest
import torch

from lockstep.kernels.experts import experts_reference, grouped_experts
from lockstep.kernels.norm_rotary import norm_and_rotate, norm_and_rotate_both
from lockstep.kernels.paged_attention import length_bias, paged_attention, paged_attention_of_rows

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("turned_dims", [8, 4])
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
def test_queries_and_keys_are_normed_by_their_own_weights_and_turned(weight_offset: float, turned_dims: int) -> None:
    q, k = normal(5, 4, 8), normal(5, 2, 8, seed=1)
    q_weight, k_weight = normal(8, seed=2), normal(8, seed=3)
    tables = normal(5, 1, turned_dims, seed=4), normal(5, 1, turned_dims, seed=5)
    # An eps of the size of the mean square, so that a forgotten one shows.
    got = norm_and_rotate_both(q, k, q_weight, k_weight, 0.5, weight_offset, tables)
    torch.testing.assert_close(got[:, :4], norm_and_rotate(q, q_weight, 0.5, weight_offset, tables), **CLOSE)
    torch.testing.assert_close(got[:, 4:], norm_and_rotate(k, k_weight, 0.5, weight_offset, tables), **CLOSE)


def test_rows_attend_to_the_visible_slots_of_their_own_blocks() -> None:
    kv_cache, q = normal(2, 2, 8, 4, 8), normal(3, 6, 8, seed=1)
    block_tables = torch.tensor([[4, 1, 6], [2, 0, 0], [3, 5, 0]])
    bias = length_bias(torch.tensor([10, 1, 8]), 12, torch.float32)
    got = paged_attention_of_rows(q, kv_cache, block_tables, bias.repeat(2, 1, 1))
    torch.testing.assert_close(got, paged_attention(q[:, None], kv_cache, block_tables, bias)[:, 0], **CLOSE)


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_experts_without_gradients_add_up_to_the_same(tokens: int) -> None:
    x, weights = normal(tokens, 8), normal(tokens, 3, seed=1).softmax(-1)
    chosen = normal(tokens, 5, seed=2).topk(3).indices
    gate_up, down = normal(5, 24, 8, seed=3), normal(5, 8, 12, seed=4)
    with torch.inference_mode():
        got = grouped_experts(x, chosen, weights, gate_up, down)
    torch.testing.assert_close(got, experts_reference(x, chosen, weights, gate_up, down), rtol=1e-5, atol=1e-4)
