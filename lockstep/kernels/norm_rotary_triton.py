"""The Triton kernels of `lockstep.kernels.norm_rotary`: one pass each way. Import it only where there is a GPU.

A program holds a few head vectors. A turned number needs its partner half a turn's width away, which is read a second
time: it is in the cache. Computed in fp32 and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_NUMBERS = 2048
"""Numbers that a program holds at once."""
_NUM_WARPS = 2
_PROGRAMS = 1056
"""Programs of a backward pass; each sums its part of the weight's gradient."""


class NormRotary(torch.autograd.Function):
    """Heads `[T, N, H]`, contiguous in H, with tables `[T, 1, R]`."""

    @staticmethod
    def forward(
        ctx: Any, x_TNH: Tensor, weight_H: Tensor, eps: float, weight_offset: float, cos: Tensor, signed_sin: Tensor
    ) -> Tensor:
        if x_TNH.stride(-1) != 1:
            x_TNH = x_TNH.contiguous()
        ctx.save_for_backward(x_TNH, weight_H, cos, signed_sin)
        ctx.eps, ctx.weight_offset = eps, weight_offset
        out = torch.empty_like(x_TNH, memory_format=torch.contiguous_format)
        if x_TNH.numel():
            rows, sizes = _sizes(x_TNH, cos)
            _norm_rotary_forward[(triton.cdiv(rows, sizes["ROWS"]),)](
                x_TNH, weight_H, cos, signed_sin, out, rows, *x_TNH.stride()[:2], eps, weight_offset, **sizes
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x_TNH, weight_H, cos, signed_sin = ctx.saved_tensors
        d_out = d_out.contiguous()
        d_x = torch.empty_like(d_out)
        rows, sizes = _sizes(x_TNH, cos)
        programs = max(1, min(_PROGRAMS, triton.cdiv(rows, sizes["ROWS"])))
        d_weights_PH = d_out.new_empty(programs, len(weight_H), dtype=torch.float32)
        _norm_rotary_backward[(programs,)](
            x_TNH, weight_H, cos, signed_sin, d_out, d_x, d_weights_PH,
            rows, *x_TNH.stride()[:2], ctx.eps, ctx.weight_offset, **sizes,
        )  # fmt: skip
        return d_x, d_weights_PH.sum(0).to(weight_H.dtype), None, None, None, None


def _sizes(x_TNH: Tensor, cos: Tensor) -> tuple[int, dict[str, int]]:
    tokens, heads, head_dim = x_TNH.shape
    block = triton.next_power_of_2(head_dim)
    rows = max(1, _NUMBERS // block)
    return tokens * heads, {
        "HEADS": heads, "HEAD_DIM": head_dim, "TURNED": cos.shape[-1], "ROWS": rows, "BLOCK": block,
        "num_warps": _NUM_WARPS,
    }  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _norm_rotary_forward(  # type: ignore[no-untyped-def]
    x_ptr, weight, cos, sin, out, num_rows, token_stride, head_stride, eps, weight_offset,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TURNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dim = tl.arange(0, BLOCK)[None, :]
    is_turned = dim < TURNED
    partner = tl.where(is_turned, (dim + TURNED // 2) % TURNED, dim)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    token, head = row // HEADS, row % HEADS
    inside = (row < num_rows) & (dim < HEAD_DIM)
    start = x_ptr + token.to(tl.int64) * token_stride + head * head_stride
    x = tl.load(start + dim, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(start + partner, mask=inside & is_turned, other=0.0).to(tl.float32)
    w = weight_offset + tl.load(weight + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
    w_other = weight_offset + tl.load(weight + partner, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
    c = tl.load(cos + token * TURNED + dim, mask=inside & is_turned, other=1.0).to(tl.float32)
    s = tl.load(sin + token * TURNED + dim, mask=inside & is_turned, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)[:, None]
    tl.store(out + row.to(tl.int64) * HEAD_DIM + dim, (x * w * c + other * w_other * s) * scale, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _norm_rotary_backward(  # type: ignore[no-untyped-def]
    x_ptr, weight, cos, sin, d_out, d_x, d_weights, num_rows, token_stride, head_stride, eps, weight_offset,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TURNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dim = tl.arange(0, BLOCK)[None, :]
    is_turned = dim < TURNED
    partner = tl.where(is_turned, (dim + TURNED // 2) % TURNED, dim)
    w = weight_offset + tl.load(weight + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
    d_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS))[:, None]
        token, head = row // HEADS, row % HEADS
        inside = (row < num_rows) & (dim < HEAD_DIM)
        x = tl.load(x_ptr + token.to(tl.int64) * token_stride + head * head_stride + dim, mask=inside, other=0.0).to(
            tl.float32
        )
        at = row.to(tl.int64) * HEAD_DIM
        d = tl.load(d_out + at + dim, mask=inside, other=0.0).to(tl.float32)
        d_other = tl.load(d_out + at + partner, mask=inside & is_turned, other=0.0).to(tl.float32)
        c = tl.load(cos + token * TURNED + dim, mask=inside & is_turned, other=1.0).to(tl.float32)
        s = tl.load(sin + token * TURNED + partner, mask=inside & is_turned, other=0.0).to(tl.float32)
        d_normed = d * c + d_other * s
        scale = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)[:, None]
        x *= scale
        d_weight += d_normed * x
        d_normed *= w
        mean = (tl.sum(d_normed * x, 1) / HEAD_DIM)[:, None]
        tl.store(d_x + at + dim, scale * (d_normed - x * mean), mask=inside)
    column = tl.arange(0, BLOCK)
    tl.store(d_weights + tl.program_id(0) * HEAD_DIM + column, tl.sum(d_weight, 0), mask=column < HEAD_DIM)
