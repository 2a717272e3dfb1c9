"""The Triton kernels of `lockstep.kernels.swiglu`, one pass each way. Import it only where there is a GPU."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_MOST_COLUMNS = 2048
"""Columns that a program holds at once; wider rows are walked."""


class SwiGLU(torch.autograd.Function):
    """Output `[..., I]` of gates and ups `[..., I]`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        _launch(_swiglu_forward, gate, gate, up, gate, gate, out, row_stride=gate.shape[-1])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        d_out = d_out.contiguous()
        _launch(_swiglu_backward, gate, gate, up, gate, gate, d_out, d_gate, d_up, gate, row_stride=gate.shape[-1])
        return d_gate, d_up


class WeightedSwiGLU(torch.autograd.Function):
    """Output `[R, I]` of `[gates | ups]` `[R, 2 I]`, weights `[T, S]` and the row of each of them, `[T, S]`."""

    @staticmethod
    def forward(ctx: Any, gate_up_RJ: Tensor, weights_TS: Tensor, row_TS: Tensor) -> Tensor:
        gate_up_RJ, weights_TS = gate_up_RJ.contiguous(), weights_TS.contiguous()
        ctx.save_for_backward(gate_up_RJ, weights_TS)
        ctx.row_TS = row_TS
        gate, up = gate_up_RJ.chunk(2, dim=-1)
        out_RI = torch.empty_like(gate, memory_format=torch.contiguous_format)
        _launch(
            _swiglu_forward, out_RI, gate, up, weights_TS, row_TS, out_RI,
            row_stride=gate_up_RJ.shape[1], weighted=True, num_warps=2,
        )  # fmt: skip
        return out_RI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_RI: Tensor) -> tuple[Tensor, Tensor | None, None]:
        gate_up_RJ, weights_TS = ctx.saved_tensors
        d_gate_up_RJ, d_weights_TS = torch.empty_like(gate_up_RJ), torch.empty_like(weights_TS)
        d_out_RI = d_out_RI.contiguous()
        _launch(
            _swiglu_backward, d_out_RI, *gate_up_RJ.chunk(2, dim=-1), weights_TS, ctx.row_TS, d_out_RI,
            *d_gate_up_RJ.chunk(2, dim=-1), d_weights_TS, row_stride=gate_up_RJ.shape[1], weighted=True,
        )  # fmt: skip
        return d_gate_up_RJ, d_weights_TS if ctx.needs_input_grad[1] else None, None


def _launch(
    kernel: Any, like_RI: Tensor, *tensors: Tensor, row_stride: int, weighted: bool = False, num_warps: int = 4
) -> None:
    width = like_RI.shape[-1]
    if like_RI.numel() == 0:
        return
    block = min(_MOST_COLUMNS, triton.next_power_of_2(width))
    kernel[(like_RI.numel() // width,)](
        *tensors, width, row_stride, WEIGHTED=weighted, BLOCK=block, num_warps=num_warps
    )


@triton.jit  # type: ignore[untyped-decorator]
def _swiglu_forward(  # type: ignore[no-untyped-def]
    gate, up, weights, rows, out, width, row_stride, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    slot = tl.program_id(0)
    if WEIGHTED:
        row = tl.load(rows + slot).to(tl.int64)
        weight = tl.load(weights + slot).to(tl.float32)
    else:
        row = slot.to(tl.int64)
        weight = 1.0
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        g = tl.load(gate + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * width + column, g * tl.sigmoid(g) * u * weight, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _swiglu_backward(  # type: ignore[no-untyped-def]
    gate, up, weights, rows, d_out, d_gate, d_up, d_weights, width, row_stride,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    if WEIGHTED:
        row = tl.load(rows + slot).to(tl.int64)
        weight = tl.load(weights + slot).to(tl.float32)
    else:
        row = slot.to(tl.int64)
        weight = 1.0
    d_weight = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        g = tl.load(gate + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(d_out + row * width + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(g)
        silu = g * sigmoid
        if WEIGHTED:
            d_weight += d * silu * u
            d = d * weight
        tl.store(d_gate + row * row_stride + column, d * u * (sigmoid + silu * (1.0 - sigmoid)), mask=inside)
        tl.store(d_up + row * row_stride + column, d * silu, mask=inside)
    if WEIGHTED:
        tl.store(d_weights + slot, tl.sum(d_weight))
