"""The short causal convolution as Triton kernels, forward and backward. Sums are in fp32; results repeat bit for bit.

T packed tokens, C channels, W taps, P = W - 1 earlier inputs that a token sees, B documents, N blocks of tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from lockstep.kernels.gated_delta_rule import DeltaLayout

_CHANNELS = 128
"""Channels of one program."""


class CausalConv(torch.autograd.Function):
    """Outputs `[T, C]` from inputs, weight and earlier inputs `[B, C, P]`; blocks of tokens are the rule's chunks."""

    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, weight_CW: Tensor, state_BCP: Tensor, layout: DeltaLayout) -> Tensor:
        x_TC, weight_CW, state_BCP = x_TC.contiguous(), weight_CW.contiguous(), state_BCP.contiguous()
        ctx.save_for_backward(x_TC, weight_CW, state_BCP)
        ctx.layout = layout
        out = torch.empty_like(x_TC)
        _forward[_grid(x_TC, layout)](
            x_TC, weight_CW, state_BCP, *layout.chunk_tables, out, x_TC.shape[1], **_sizes(weight_CW, layout)
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, state = ctx.saved_tensors
        layout, taps = ctx.layout, weight.shape[1]
        grid, sizes = _grid(x, layout), _sizes(weight, layout)
        d_sum = torch.empty_like(x, dtype=torch.float32)
        d_weights = d_sum.new_empty(grid[1], *weight.shape)
        _backward_of_sum[grid](
            x, weight, state, *layout.chunk_tables, d_out.contiguous(), d_sum, d_weights, x.shape[1], **sizes
        )
        d_x = torch.empty_like(x)
        _backward_of_inputs[grid](weight, *layout.chunk_tables, d_sum, d_x, x.shape[1], **sizes)
        d_state = None
        if ctx.needs_input_grad[2]:
            d_state = torch.zeros_like(state, dtype=torch.float32)
            padded = torch.cat([d_sum, d_sum.new_zeros(1, x.shape[1])])
            starts, ends = layout.cu_seqlens[:-1], layout.cu_seqlens[1:]
            for column in range(taps - 1):
                for tap in range(column + 1):
                    rows = starts + column - tap
                    d_state[..., column] += padded[torch.where(rows < ends, rows, len(x))] * weight[:, tap]
            d_state = d_state.to(state.dtype)
        return d_x, d_weights.sum(0).to(weight.dtype), d_state, None


def _grid(x_TC: Tensor, layout: DeltaLayout) -> tuple[int, int]:
    return triton.cdiv(x_TC.shape[1], _CHANNELS), len(layout.rows_NC)


def _sizes(weight_CW: Tensor, layout: DeltaLayout) -> dict[str, int]:
    return {"W": weight_CW.shape[1], "ROWS": layout.rows_NC.shape[1], "COLUMNS": _CHANNELS}


@triton.jit  # type: ignore[untyped-decorator]
def _input(  # type: ignore[no-untyped-def]
    x_ptr, state_ptr, document, first, rows, columns, real, channels, W: tl.constexpr
):
    """Inputs at these rows, from before the document's first row out of the state."""
    inside = (rows >= first)[:, None]
    x = tl.load(x_ptr + rows[:, None] * channels + columns[None, :], mask=real & inside, other=0.0)
    earlier = (document * channels + columns[None, :]) * (W - 1) + (rows - first + W - 1)[:, None]
    return tl.where(inside, x, tl.load(state_ptr + earlier, mask=real & (rows < first)[:, None], other=0.0)).to(
        tl.float32
    )


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, state_ptr, starts_ptr, sizes_ptr, firsts_ptr, documents_ptr, ends_ptr, out_ptr, channels,
    W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    columns, places = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    rows = tl.load(starts_ptr + block) + places
    real = (places < tl.load(sizes_ptr + block))[:, None] & (columns < channels)[None, :]
    first, document = tl.load(firsts_ptr + block), tl.load(documents_ptr + block)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for tap in tl.static_range(W):
        x = _input(x_ptr, state_ptr, document, first, rows - (W - 1) + tap, columns, real, channels, W)
        total += x * tl.load(weight_ptr + columns * W + tap, mask=columns < channels, other=0.0).to(tl.float32)[None, :]
    out = total * tl.sigmoid(total)
    tl.store(out_ptr + rows[:, None] * channels + columns[None, :], out.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_of_sum(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, state_ptr, starts_ptr, sizes_ptr, firsts_ptr, documents_ptr, ends_ptr, d_out_ptr, d_sum_ptr,
    d_weights_ptr, channels,
    W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradient of the sum before SiLU, and this block's share of the weight's."""
    block = tl.program_id(1)
    columns, places = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    rows = tl.load(starts_ptr + block) + places
    real = (places < tl.load(sizes_ptr + block))[:, None] & (columns < channels)[None, :]
    first, document = tl.load(firsts_ptr + block), tl.load(documents_ptr + block)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for tap in tl.static_range(W):
        x = _input(x_ptr, state_ptr, document, first, rows - (W - 1) + tap, columns, real, channels, W)
        total += x * tl.load(weight_ptr + columns * W + tap, mask=columns < channels, other=0.0).to(tl.float32)[None, :]
    cells = rows[:, None] * channels + columns[None, :]
    gate = tl.sigmoid(total)
    d_sum = tl.load(d_out_ptr + cells, mask=real, other=0.0).to(tl.float32) * gate * (1 + total * (1 - gate))
    tl.store(d_sum_ptr + cells, d_sum, mask=real)
    for tap in tl.static_range(W):
        x = _input(x_ptr, state_ptr, document, first, rows - (W - 1) + tap, columns, real, channels, W)
        target = d_weights_ptr + (block * channels + columns) * W + tap
        tl.store(target, tl.sum(x * d_sum, 0), mask=columns < channels)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_of_inputs(  # type: ignore[no-untyped-def]
    weight_ptr, starts_ptr, sizes_ptr, firsts_ptr, documents_ptr, ends_ptr, d_sum_ptr, d_x_ptr, channels,
    W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    columns, places = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    rows = tl.load(starts_ptr + block) + places
    real = (places < tl.load(sizes_ptr + block))[:, None] & (columns < channels)[None, :]
    end = tl.load(ends_ptr + block)
    d_x = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for tap in tl.static_range(W):
        later = (rows + (W - 1) - tap)[:, None]
        d_sum = tl.load(d_sum_ptr + later * channels + columns[None, :], mask=real & (later < end), other=0.0)
        weight = tl.load(weight_ptr + columns * W + tap, mask=columns < channels, other=0.0)
        d_x += d_sum * weight.to(tl.float32)[None, :]
    tl.store(d_x_ptr + rows[:, None] * channels + columns[None, :], d_x.to(d_x_ptr.dtype.element_ty), mask=real)
