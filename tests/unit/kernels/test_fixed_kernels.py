"""Kernels of true on-policy runs: the right values, and bits that do not depend on what is computed beside a row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lockstep.kernels.attention import packed_attention_reference
from lockstep.kernels.experts import experts_reference
from lockstep.kernels.fixed_attention import FixedAttention, fixed_paged_decode
from lockstep.kernels.fixed_experts import fixed_experts, sum_in_order
from lockstep.kernels.fixed_product import fixed_grouped_product, fixed_product
from lockstep.kernels.fixed_swiglu import fixed_swiglu

DTYPES = [torch.float32, torch.bfloat16]
CPU = torch.device("cpu")
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Of sums of some dozen products; an error in what is summed is of order 1."""


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(got: Tensor, wanted: Tensor) -> None:
    error = float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())
    assert error < ROUNDING[got.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "out"), [(24, 7), (33, 97), (256, 160)])
def test_a_row_of_a_product_has_the_same_bits_in_every_company(width: int, out: int, dtype: torch.dtype) -> None:
    x, weight = draw(150, width, dtype=dtype), draw(out, width, seed=1, dtype=dtype)
    whole = fixed_product(x, weight)
    assert_close(whole, x.double() @ weight.double().T)
    for start, count in ((0, 1), (149, 1), (31, 2), (5, 33), (64, 64), (17, 100)):
        assert torch.equal(fixed_product(x[start : start + count], weight), whole[start : start + count])
    others = draw(150, width, seed=2, dtype=dtype)
    others[77] = x[3]
    assert torch.equal(fixed_product(others, weight)[77], whole[3])
    assert fixed_product(x[:0], weight).shape == (0, out)


def test_gradients_of_a_product_are_those_of_a_linear_layer() -> None:
    x, weight = draw(40, 24).requires_grad_(), draw(9, 24, seed=1).requires_grad_()
    upstream = draw(40, 9, seed=2)
    got = torch.autograd.grad(fixed_product(x, weight), (x, weight), upstream)
    wanted = torch.autograd.grad(x @ weight.T, (x, weight), upstream)
    torch.testing.assert_close(got, wanted)


def test_grouped_products_are_those_of_every_expert_and_so_are_their_gradients() -> None:
    x, weight = draw(70, 24).requires_grad_(), draw(5, 9, 24, seed=1).requires_grad_()
    counts = [3, 0, 40, 26, 1]
    ends = torch.tensor(counts).cumsum(0).int()
    got = fixed_grouped_product(x, weight, ends)
    wanted = torch.cat([rows @ w.T for rows, w in zip(x.split(counts), weight, strict=True)])
    torch.testing.assert_close(got, wanted)
    single = [fixed_product(rows, w) for rows, w in zip(x.split(counts), weight, strict=True)]
    assert torch.equal(got, torch.cat(single))
    upstream = draw(70, 9, seed=2)
    for ours, theirs in zip(
        torch.autograd.grad(got, (x, weight), upstream),
        torch.autograd.grad(wanted, (x, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_an_activation_does_not_depend_on_its_place_in_memory() -> None:
    gate, up = draw(37, 19), draw(37, 19, seed=1)
    whole = fixed_swiglu(gate, up)
    torch.testing.assert_close(whole, torch.nn.functional.silu(gate) * up)
    for count in (1, 2, 5, 36):
        assert torch.equal(fixed_swiglu(gate[:count].clone(), up[:count].clone()), whole[:count])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tokens_experts_add_up_to_the_same_bits_in_every_company(dtype: torch.dtype) -> None:
    tokens, width, inner, experts = 90, 24, 16, 5
    x = draw(tokens, width, dtype=dtype)
    chosen = draw(tokens, experts, seed=1).topk(3).indices
    weights = torch.softmax(draw(tokens, 3, seed=2), -1).to(dtype)
    gate_up, down = (
        draw(experts, 2 * inner, width, seed=3, dtype=dtype),
        draw(experts, width, inner, seed=4, dtype=dtype),
    )
    whole = fixed_experts(x, chosen, weights, gate_up, down)
    wide = experts_reference(*(t if t is chosen else t.double() for t in (x, chosen, weights, gate_up, down)))
    error = (whole.double() - wide).abs().max() / wide.abs().max()
    assert error < 3 * ROUNDING[dtype]  # of two products, one after the other
    for part in (slice(0, 1), slice(89, 90), slice(10, 80)):
        assert torch.equal(fixed_experts(x[part], chosen[part], weights[part], gate_up, down), whole[part])


def test_slots_are_summed_one_after_the_other_and_rounded_once() -> None:
    x = torch.tensor([[[256.0], [1.0], [1.0]]], dtype=torch.bfloat16)
    assert sum_in_order(x).tolist() == [[258.0]]
    assert sum_in_order(torch.tensor([[[1e8], [1.0], [-1e8]]])).tolist() == [[0.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "keys"), [(2, 1), (6, 2), (20, 1)])
def test_a_tokens_attention_has_the_same_bits_alone_in_parts_and_packed(
    heads: int, keys: int, dtype: torch.dtype
) -> None:
    lengths, dim = [70, 1, 150, 33], 24
    total = sum(lengths)
    q = draw(total, heads, dim, dtype=dtype)
    k, v = draw(total, keys, dim, seed=1, dtype=dtype), draw(total, keys, dim, seed=2, dtype=dtype)
    whole = FixedAttention(lengths, lengths, CPU)(q, k, v)
    assert_close(whole, packed_attention_reference(q.double(), k.double(), v.double(), lengths))
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        for first in {0, 1, length // 2, length - 1}:
            tail = slice(start + min(first, length - 1), start + length)
            attention = FixedAttention([tail.stop - tail.start], [length], CPU)
            assert torch.equal(attention(q[tail], k[rows], v[rows]), whole[tail])
        start += length


def test_decoding_over_a_paged_cache_has_the_bits_of_the_pack_and_reads_nothing_else() -> None:
    length, block_size, dim = 150, 4, 24
    q, k, v = draw(length, 4, dim), draw(length, 2, dim, seed=1), draw(length, 2, dim, seed=2)
    whole = FixedAttention([length], [length], CPU)(q, k, v)
    cache = torch.full((2, 2, 60, block_size, dim), float("nan"))
    blocks = torch.randperm(60, generator=torch.Generator().manual_seed(3))[: -(-length // block_size)]
    slots = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()[:length]
    cache.flatten(2, 3)[0, :, slots], cache.flatten(2, 3)[1, :, slots] = k.transpose(0, 1), v.transpose(0, 1)
    seen = torch.tensor([1, 64, 0, 65, 150])
    tables = blocks.int()[None].repeat(len(seen), 1)
    got = fixed_paged_decode(q[(seen - 1).clamp(min=0)], cache, tables, seen)
    assert torch.equal(got[[0, 1, 3, 4]], whole[[0, 63, 64, 149]])
    assert got[2].eq(0).all()


def test_gradients_of_attention_are_those_of_the_specification() -> None:
    lengths = [6, 1, 80]
    inputs = [draw(87, n, 8, seed=n).double().requires_grad_() for n in (4, 2, 1)]
    q, k = inputs[0], inputs[1]
    upstream = draw(87, 4, 8, seed=9).double()
    got = torch.autograd.grad(FixedAttention(lengths, lengths, CPU)(q, k, k), (q, k), upstream)
    wanted = torch.autograd.grad(packed_attention_reference(q, k, k, lengths), (q, k), upstream)
    torch.testing.assert_close(got, wanted)
