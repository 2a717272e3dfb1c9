"""The GPU's kernels against their specifications in fp32 or fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lockstep.kernels.attention import PackedAttention, packed_attention_reference
from lockstep.kernels.experts import experts_reference, grouped_experts
from lockstep.kernels.linear_log_probs import linear_log_probs, linear_log_probs_reference
from lockstep.kernels.paged_attention import paged_attention

LENGTHS = [700, 1, 130, 64, 1025]


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(("heads", "key_heads", "head_dim"), [(8, 2, 64), (32, 4, 128), (16, 2, 256)])
def test_varlen_attention_and_its_gradients_are_right_to_bf16(heads: int, key_heads: int, head_dim: int) -> None:
    """bf16 inputs have 8 bits: errors stay under 1e-2, and under twice those of the plain version in bf16."""
    torch.manual_seed(0)
    total = sum(LENGTHS)
    shapes = [(total, heads, head_dim), (total, key_heads, head_dim), (total, key_heads, head_dim)]
    exact = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    upstream = torch.randn(shapes[0], device="cuda", dtype=torch.bfloat16)
    attend = PackedAttention(LENGTHS, torch.device("cuda"))

    def run(kernel, dtype):  # type: ignore[no-untyped-def]
        q, k, v = (x.detach().clone().to(dtype).requires_grad_() for x in exact)
        out = kernel(q, k, v)
        out.backward(upstream.to(dtype))
        return out, q.grad, k.grad, v.grad

    wanted = run(lambda q, k, v: packed_attention_reference(q, k, v, LENGTHS), torch.float32)
    plain = run(lambda q, k, v: packed_attention_reference(q, k, v, LENGTHS), torch.bfloat16)
    fast = run(lambda q, k, v: attend(q, k, v), torch.bfloat16)
    for got, naive, want in zip(fast, plain, wanted, strict=True):
        assert relative_error(got, want) < min(1e-2, 2 * relative_error(naive, want))


@pytest.mark.parametrize(("heads", "key_heads", "head_dim"), [(32, 4, 128), (16, 2, 256)])
def test_gradients_of_varlen_attention_repeat_bit_for_bit(heads: int, key_heads: int, head_dim: int) -> None:
    """Where the order of sums is left open, passes over documents this long do not agree."""
    torch.manual_seed(0)
    lengths = [2048, 1, 4096, 700]
    q, k, v = (
        torch.randn(sum(lengths), n, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for n in (heads, key_heads, key_heads)
    )
    attend, upstream = PackedAttention(lengths, torch.device("cuda")), torch.randn_like(q)
    first = torch.autograd.grad(attend(q, k, v), (q, k, v), upstream)
    for _ in range(4):
        again = torch.autograd.grad(attend(q, k, v), (q, k, v), upstream)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("tokens", [3, 257])
def test_grouped_experts_and_their_gradients_are_right_to_bf16(tokens: int) -> None:
    """Some experts get no token at all; errors stay under twice those of the loop over experts in bf16."""
    torch.manual_seed(0)
    x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
    gate_up = torch.randn(16, 2 * 192, 256, device="cuda", dtype=torch.bfloat16) / 16
    down = torch.randn(16, 256, 192, device="cuda", dtype=torch.bfloat16) / 14
    weights, experts = torch.rand(tokens, 16, device="cuda").softmax(-1)[:, :12].topk(4)

    def run(kernel, dtype):  # type: ignore[no-untyped-def]
        inputs = [t.detach().clone().to(dtype).requires_grad_() for t in (x, weights, gate_up, down)]
        out = kernel(inputs[0], experts, *inputs[1:])
        out.float().square().sum().backward()
        return [out, *(t.grad for t in inputs)]

    wanted = run(experts_reference, torch.float32)
    plain = run(experts_reference, torch.bfloat16)
    for got, naive, want in zip(run(grouped_experts, torch.bfloat16), plain, wanted, strict=True):
        assert relative_error(got, want) < 2 * relative_error(naive, want) + 1e-6


def test_paged_attention_equals_attention_over_the_whole_document() -> None:
    """Blocks in random order, three sequences of different lengths, fp32: equal to 1e-5."""
    torch.manual_seed(0)
    lengths, block_size = [37, 5, 64], 16
    q, k, v = torch.randn(3, 1, 8, 64), *(torch.randn(3, 64, 2, 64) for _ in range(2))
    cache = torch.randn(2, 2, 20, block_size, 64)
    tables = torch.randperm(20)[:12].view(3, 4)
    for b, length in enumerate(lengths):
        for position in range(length):
            block = tables[b, position // block_size]
            cache[0, :, block, position % block_size] = k[b, position]
            cache[1, :, block, position % block_size] = v[b, position]
    bias = torch.where(torch.arange(64) < torch.tensor(lengths)[:, None, None], 0.0, -torch.inf)
    got = paged_attention(q.cuda(), cache.cuda(), tables.cuda(), bias.cuda()).cpu()
    for b, length in enumerate(lengths):
        queries = torch.zeros(length, 8, 64)
        queries[-1] = q[b, 0]
        want = packed_attention_reference(queries, k[b, :length], v[b, :length], [length])[-1]
        torch.testing.assert_close(got[b, 0], want, rtol=1e-5, atol=1e-5)


def test_fused_log_probs_in_bf16_are_as_good_as_the_plain_ones() -> None:
    """Against fp64 on the same bf16 inputs; the vocabulary is Qwen3's, the rows do not fill the last chunk."""
    torch.manual_seed(0)
    hidden = torch.randn(777, 256, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(151_936, 256, device="cuda", dtype=torch.bfloat16) / 16
    targets = torch.randint(0, 151_936, (777,), device="cuda")

    def run(kernel, dtype):  # type: ignore[no-untyped-def]
        h, w = hidden.clone().to(dtype).requires_grad_(), weight.clone().to(dtype).requires_grad_()
        log_probs, entropy = kernel(h, w, targets)
        (log_probs.sum() + 0.1 * entropy.sum()).backward()
        return log_probs, entropy, h.grad, w.grad

    wanted = run(linear_log_probs_reference, torch.float64)
    plain = run(linear_log_probs_reference, torch.bfloat16)
    fused = run(lambda h, w, t: linear_log_probs(h, w, t, chunk_rows=256), torch.bfloat16)
    for got, naive, want in zip(fused, plain, wanted, strict=True):
        assert relative_error(got, want) < 2 * relative_error(naive, want) + 1e-6
