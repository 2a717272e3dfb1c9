"""Triton's attention on a Hopper GPU against softmax written out, and what it promises beyond."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lockstep.kernels import flash_attention_triton
from lockstep.kernels.attention import SegmentAttention, has_own_kernel, packed_attention_reference, varlen_attention
from lockstep.kernels.packed import PackedDocuments

if torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("these kernels are for Hopper GPUs", allow_module_level=True)

CUDA = torch.device("cuda")
HEADS = [(8, 2, 64), (32, 4, 128), (32, 8, 128), (16, 2, 256)]
WHOLE = [700, 1, 0, 130, 64, 1025]
PARTS = ([5, 40, 1, 200], [300, 40, 333, 700])
"""Queries and keys of documents whose first tokens came earlier."""


def rows(count: int, *heads: int, head_dim: int, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(count, n, head_dim, device=CUDA, dtype=torch.bfloat16) for n in heads]


def written_out(q: Tensor, k: Tensor, v: Tensor, *, queries: list[int], keys: list[int]) -> Tensor:
    outputs = []
    for one_q, one_k, one_v in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
        before = len(one_k) - len(one_q)
        padded = torch.cat([one_q.new_zeros(before, *one_q.shape[1:]), one_q])
        outputs.append(packed_attention_reference(padded, one_k, one_v, [len(one_k)])[before:])
    return torch.cat(outputs)


@pytest.mark.parametrize(("queries", "keys"), [(WHOLE, WHOLE), PARTS], ids=["whole", "parts"])
@pytest.mark.parametrize(("heads", "key_heads", "head_dim"), HEADS)
def test_it_is_closer_to_fp32_than_the_plain_version(
    heads: int, key_heads: int, head_dim: int, queries: list[int], keys: list[int]
) -> None:
    """The plain version rounds scores and weights to bf16, the kernels weights alone."""
    q, upstream = rows(sum(queries), heads, heads, head_dim=head_dim)
    k, v = rows(sum(keys), key_heads, key_heads, head_dim=head_dim, seed=1)
    assert has_own_kernel(q, k, v)

    def run(kernel, dtype):  # type: ignore[no-untyped-def]
        inputs = [x.to(dtype).requires_grad_() for x in (q.clone(), k.clone(), v.clone())]
        out = kernel(*inputs)
        return [out, *torch.autograd.grad(out, inputs, upstream.to(dtype))]

    plain = partial(written_out, queries=queries, keys=keys)
    wanted, naive = run(plain, torch.float32), run(plain, torch.bfloat16)
    for got, rough, want in zip(run(SegmentAttention(queries, keys, CUDA), torch.bfloat16), naive, wanted, strict=True):
        assert (got - want).norm() < (rough - want).norm()


@pytest.mark.parametrize(("heads", "key_heads", "head_dim"), HEADS[1:])
def test_a_token_gets_the_same_bits_alone_in_a_pack_and_in_parts(heads: int, key_heads: int, head_dim: int) -> None:
    lengths = [2048, 1, 3333, 700]
    (q, k, v) = rows(sum(lengths), heads, key_heads, key_heads, head_dim=head_dim)
    own = slice(2049, 2049 + 3333)
    together = SegmentAttention(lengths, lengths, CUDA)(q, k, v)[own]
    q, k, v = q[own], k[own], v[own]
    assert torch.equal(SegmentAttention([3333], [3333], CUDA)(q, k, v), together)
    for cut in (1, 64, 1111, 3332):
        first = SegmentAttention([cut], [cut], CUDA)(q[:cut], k[:cut], v[:cut])
        second = SegmentAttention([3333 - cut], [3333], CUDA)(q[cut:], k, v)
        assert torch.equal(torch.cat([first, second]), together)


def test_what_attention_found_is_kept_and_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same output and same gradients to the bit; forward's kernel runs once instead of twice."""
    lengths = [700, 1, 130]
    inputs = [x.requires_grad_() for x in rows(sum(lengths), 8, 2, 2, head_dim=128)]
    upstream = torch.randn_like(inputs[0])
    forward, calls = flash_attention_triton._forward, []

    def counted(*arguments):  # type: ignore[no-untyped-def]
        calls.append(1)
        return forward(*arguments)

    monkeypatch.setattr(flash_attention_triton, "_forward", counted)

    def run(keeps: bool) -> tuple[list[Tensor], int]:
        calls.clear()
        documents = PackedDocuments(lengths, CUDA, keeps_attention=keeps)
        out = checkpoint(lambda *x: documents.attend(0, *(2 * y for y in x)).sin(), *inputs, use_reentrant=False)
        return [out, *torch.autograd.grad(out, inputs, upstream)], len(calls)

    (again, twice), (kept, once) = run(False), run(True)
    assert (twice, once) == (2, 1)
    assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))


def test_torchs_kernel_serves_other_gpus_and_repeats_bit_for_bit() -> None:
    """What GPUs other than Hopper's compute with."""
    q, k, v = (x.requires_grad_() for x in rows(4096 + 700, 32, 4, 4, head_dim=128))
    ends, upstream = torch.tensor([0, 4096, 4796], dtype=torch.int32, device=CUDA), torch.randn_like(q)
    results = [
        torch.autograd.grad(varlen_attention(q, k, v, ends, ends, 4096, 4096), (q, k, v), upstream) for _ in range(4)
    ]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    ours = torch.autograd.grad(SegmentAttention([4096, 700], [4096, 700], CUDA)(q, k, v), (q, k, v), upstream)
    for a, b in zip(ours, results[0], strict=True):
        assert (a - b).norm() < 1e-2 * b.norm()  # two roundings to bf16
