"""The Triton kernels of `lockstep.kernels.rms_norm`. Import it only where there is a GPU.

Everything is computed in fp32 and rounded once. The backward pass finds each row's root mean square again; programs
walk over rows and keep their part of the weight's gradient, which is then summed in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lockstep.kernels.overlap_triton import begin, overlapping

_PROGRAMS = 1056
"""Programs of a backward pass: about eight on each multiprocessor of a large GPU."""


class RMSNorm(torch.autograd.Function):
    """`x + update` and its norm; without an update, `x` itself and its norm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, update: Tensor | None, weight_D: Tensor, eps: float, weight_offset: float
    ) -> tuple[Tensor, Tensor]:
        rows = x.contiguous()
        normed = torch.empty_like(rows)
        stream = x if update is None else torch.empty_like(rows)
        width = x.shape[-1]
        if x.numel():
            added = rows if update is None else update.contiguous()
            _rms_norm_forward[(x.numel() // width,)](
                rows, added, weight_D, stream, normed, width, eps, weight_offset,
                ADDS=update is not None, BLOCK=triton.next_power_of_2(width), num_warps=_num_warps(width),
                **overlapping(x.device),
            )  # fmt: skip
        ctx.save_for_backward(rows if update is None else stream, weight_D)
        ctx.adds, ctx.eps, ctx.weight_offset = update is not None, eps, weight_offset
        ctx.set_materialize_grads(False)
        return stream, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_stream: Tensor | None, d_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, weight_D = ctx.saved_tensors
        if d_normed is None:
            return d_stream, d_stream if ctx.adds else None, None, None, None
        width = rows.shape[-1]
        num_rows = rows.numel() // width
        programs = max(1, min(_PROGRAMS, num_rows))
        d_rows = torch.empty_like(rows)
        d_weights_PD = rows.new_empty(programs, width, dtype=torch.float32)
        d_normed = d_normed.contiguous()
        _rms_norm_backward[(programs,)](
            rows, weight_D, d_normed, d_normed if d_stream is None else d_stream.contiguous(), d_rows, d_weights_PD,
            num_rows, width, ctx.eps, ctx.weight_offset,
            ADDS=d_stream is not None, BLOCK=triton.next_power_of_2(width), num_warps=_num_warps(width),
        )  # fmt: skip
        d_weight_D = d_weights_PD.sum(0).to(weight_D.dtype)
        return d_rows, d_rows if ctx.adds else None, d_weight_D, None, None


def _num_warps(width: int) -> int:
    return 4 if width <= 4096 else 8


@triton.jit  # type: ignore[untyped-decorator]
def _rms_norm_forward(  # type: ignore[no-untyped-def]
    x_ptr, update, weight, stream, normed, width, eps, weight_offset, ADDS: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    begin(OVERLAPS)
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row + column, mask=inside, other=0.0)
    if ADDS:
        added = x.to(tl.float32) + tl.load(update + row + column, mask=inside, other=0.0).to(tl.float32)
        x = added.to(x_ptr.dtype.element_ty)
        tl.store(stream + row + column, x, mask=inside)
    x = x.to(tl.float32)
    w = weight_offset + tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row + column, x * tl.rsqrt(tl.sum(x * x) / width + eps) * w, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _rms_norm_backward(  # type: ignore[no-untyped-def]
    x_ptr, weight, d_normed, d_stream, d_x, d_weights, num_rows, width, eps, weight_offset,
    ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < width
    w = weight_offset + tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK,), tl.float32)
    for number in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.cast(number, tl.int64) * width
        x = tl.load(x_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(d_normed + row + column, mask=inside, other=0.0).to(tl.float32)
        if ADDS:
            passing = tl.load(d_stream + row + column, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x) / width + eps)
        x *= scale
        d_weight += d * x
        d *= w
        result = scale * (d - x * (tl.sum(d * x) / width))
        if ADDS:
            result += passing
        tl.store(d_x + row + column, result, mask=inside)
    tl.store(d_weights + tl.program_id(0) * width + column, d_weight, mask=inside)
