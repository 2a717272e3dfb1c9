from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lockstep.kernels.attention import PackedAttention, packed_attention_reference


def heads(length: int, num_heads: int, num_keys: int, head_dim: int = 8, seed: int = 0) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    shapes = [(length, num_heads, head_dim), (length, num_keys, head_dim), (length, num_keys, head_dim)]
    return tuple(torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True) for shape in shapes)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """One query, one head at a time."""
    rows, start = [], 0
    for length in lengths:
        for t in range(start, start + length):
            for n in range(q.shape[1]):
                key = n * k.shape[1] // q.shape[1]
                weights = torch.softmax(k[start : t + 1, key] @ q[t, n] / q.shape[2] ** 0.5, 0)
                rows.append(weights @ v[start : t + 1, key])
        start += length
    return torch.stack(rows).view(q.shape)


@pytest.mark.parametrize(("num_heads", "num_keys"), [(1, 1), (4, 2), (3, 1)])
def test_the_specification_is_softmax_attention_over_each_documents_past(num_heads: int, num_keys: int) -> None:
    lengths = [3, 1, 5]
    q, k, v = heads(9, num_heads, num_keys)
    torch.testing.assert_close(packed_attention_reference(q, k, v, lengths), naive_attention(q, k, v, lengths))


@given(st.lists(st.integers(0, 12), min_size=1, max_size=7))
def test_packed_attention_is_the_specification_for_any_lengths(lengths: list[int]) -> None:
    q, k, v = heads(sum(lengths), 4, 2, seed=len(lengths))
    got = PackedAttention(lengths, q.device)(q, k, v)
    torch.testing.assert_close(got, packed_attention_reference(q, k, v, lengths))


def test_gradients_of_packed_attention_are_those_of_the_specification() -> None:
    lengths = [6, 1, 5, 0, 11, 6]
    inputs = heads(sum(lengths), 4, 2)
    upstream = torch.randn_like(inputs[0])
    got = torch.autograd.grad(PackedAttention(lengths, inputs[0].device)(*inputs), inputs, upstream)
    wanted = torch.autograd.grad(packed_attention_reference(*inputs, lengths), inputs, upstream)
    torch.testing.assert_close(got, wanted)
