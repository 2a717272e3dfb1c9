from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lockstep.kernels.attention import PackedAttention, packed_attention_reference, paged_attention


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


def test_new_tokens_attend_to_all_cached_tokens_of_their_own_sequence() -> None:
    """Two sequences in scattered blocks of two slots, one with two new tokens and one with three."""
    lengths, new = [7, 4], [2, 3]
    q, k, v = heads(11, 4, 2)
    block_tables = torch.tensor([[4, 1, 0, 7], [3, 5, 0, 0]])
    slots = [2 * block + offset for block in block_tables[0].tolist() for offset in range(2)][:7]
    slots += [2 * block + offset for block in block_tables[1].tolist() for offset in range(2)][:4]
    kv_cache = torch.full((2, 2, 8, 2, 8), 1e9, dtype=torch.float64)
    for cache, values in zip(kv_cache, (k, v), strict=True):
        cache.flatten(1, 2)[:, slots] = values.detach().transpose(0, 1)
    wanted = packed_attention_reference(q, k, v, lengths).split(lengths)
    queries = torch.zeros(2, 3, 4, 8, dtype=torch.float64)
    bias = torch.full((2, 3, 8), float("-inf"), dtype=torch.float64)
    for row, (length, count) in enumerate(zip(lengths, new, strict=True)):
        queries[row, :count] = q.split(lengths)[row][length - count :].detach()
        for column in range(count):
            bias[row, column, : length - count + column + 1] = 0
    bias[0, 2, 0] = 0  # a padded query must see something
    got = paged_attention(queries, kv_cache, block_tables, bias)
    for row, count in enumerate(new):
        # Scores go through softmax in fp32, whatever the inputs are.
        torch.testing.assert_close(got[row, :count], wanted[row][-count:], rtol=1e-5, atol=1e-5)
