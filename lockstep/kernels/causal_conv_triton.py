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

_CHANNELS, _ROWS, _WARPS = 512, 4, 4
"""Channels of one program, rows that it computes at once, and its warps: the fastest of six tried on an H200."""


class CausalConv(torch.autograd.Function):
    """Outputs `[T, C]` from inputs, weight and earlier inputs `[B, C, P]`; blocks of tokens are the rule's chunks."""

    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, weight_CW: Tensor, state_BCP: Tensor, layout: DeltaLayout) -> Tensor:
        x_TC, weight_CW, state_BCP = x_TC.contiguous(), weight_CW.contiguous(), state_BCP.contiguous()
        ctx.save_for_backward(x_TC, weight_CW, state_BCP)
        ctx.layout = layout
        out = torch.empty_like(x_TC)
        _forward[_grid(x_TC, layout)](
            x_TC, weight_CW, state_BCP, *layout.chunk_tables, out, x_TC.shape[1], **_sizes(weight_CW)
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, state = ctx.saved_tensors
        layout, taps = ctx.layout, weight.shape[1]
        grid, sizes = _grid(x, layout), _sizes(weight)
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


def _sizes(weight_CW: Tensor) -> dict[str, int]:
    return {
        "W": weight_CW.shape[1],
        "TAPS": triton.next_power_of_2(weight_CW.shape[1]),
        "ROWS": _ROWS,
        "COLUMNS": _CHANNELS,
        "num_warps": _WARPS,
    }


@triton.jit  # type: ignore[untyped-decorator]
def _taps(  # type: ignore[no-untyped-def]
    x_ptr, state_ptr, place, places, columns, real, channels, tap, W: tl.constexpr
):
    """What this tap sees: inputs W - 1 - tap rows earlier, before the document's first row out of the state.

    Pointers are at the first of `places` and at the document's state; `place` is where the first stands in it.
    """
    back = W - 1 - tap
    x = tl.load(x_ptr + (places - back) * channels + columns, mask=real & (places >= back - place), other=0.0)
    if place < back:
        earlier = state_ptr + columns * (W - 1) + place + places + tap
        x = tl.where(places < back - place, tl.load(earlier, mask=real & (places < back - place), other=0.0), x)
    return x.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, state_ptr, starts_ptr, sizes_ptr, firsts_ptr, documents_ptr, ends_ptr, out_ptr, channels,
    W: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    columns = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    start, size = tl.load(starts_ptr + block), tl.load(sizes_ptr + block).to(tl.int32)
    place = (start - tl.load(firsts_ptr + block)).to(tl.int32)
    state_ptr += tl.load(documents_ptr + block) * channels * (W - 1)
    for row in range(0, size, ROWS):
        places = tl.arange(0, ROWS)[:, None]
        real = (places < size - row) & (columns < channels)
        here = (start + row) * channels
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for tap in tl.static_range(W):
            weight = tl.load(weight_ptr + columns * W + tap, mask=columns < channels, other=0.0).to(tl.float32)
            total += weight * _taps(x_ptr + here, state_ptr, place + row, places, columns, real, channels, tap, W)
        out = total * tl.sigmoid(total)
        tl.store(out_ptr + here + places * channels + columns, out.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_of_sum(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, state_ptr, starts_ptr, sizes_ptr, firsts_ptr, documents_ptr, ends_ptr, d_out_ptr, d_sum_ptr,
    d_weights_ptr, channels,
    W: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradient of the sum before SiLU, and this block's share of the weight's."""
    block = tl.program_id(1)
    columns = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    start, size = tl.load(starts_ptr + block), tl.load(sizes_ptr + block).to(tl.int32)
    place = (start - tl.load(firsts_ptr + block)).to(tl.int32)
    state_ptr += tl.load(documents_ptr + block) * channels * (W - 1)
    which = tl.arange(0, TAPS)[:, None]
    d_weights = tl.zeros((TAPS, COLUMNS), dtype=tl.float32)
    for row in range(0, size, ROWS):
        places = tl.arange(0, ROWS)[:, None]
        real = (places < size - row) & (columns < channels)
        here = (start + row) * channels
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for tap in tl.static_range(W):
            weight = tl.load(weight_ptr + columns * W + tap, mask=columns < channels, other=0.0).to(tl.float32)
            total += weight * _taps(x_ptr + here, state_ptr, place + row, places, columns, real, channels, tap, W)
        cells = here + places * channels + columns
        gate = tl.sigmoid(total)
        d_sum = tl.load(d_out_ptr + cells, mask=real, other=0.0).to(tl.float32) * gate * (1 + total * (1 - gate))
        tl.store(d_sum_ptr + cells, d_sum, mask=real)
        for tap in tl.static_range(W):
            x = _taps(x_ptr + here, state_ptr, place + row, places, columns, real, channels, tap, W)
            d_weights += tl.where(which == tap, tl.sum(x * d_sum, 0)[None, :], 0.0)
    target = d_weights_ptr + (block * channels + columns) * W + which
    tl.store(target, d_weights, mask=(columns < channels) & (which < W))


@triton.jit  # type: ignore[untyped-decorator]
def _backward_of_inputs(  # type: ignore[no-untyped-def]
    weight_ptr, starts_ptr, sizes_ptr, firsts_ptr, documents_ptr, ends_ptr, d_sum_ptr, d_x_ptr, channels,
    W: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    columns = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    start, size = tl.load(starts_ptr + block), tl.load(sizes_ptr + block).to(tl.int32)
    left = (tl.load(ends_ptr + block) - start).to(tl.int32)
    for row in range(0, size, ROWS):
        places = tl.arange(0, ROWS)[:, None]
        real = (places < size - row) & (columns < channels)
        here = (start + row) * channels
        d_x = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for tap in tl.static_range(W):
            later = places + (W - 1 - tap)
            weight = tl.load(weight_ptr + columns * W + tap, mask=columns < channels, other=0.0).to(tl.float32)
            cells = d_sum_ptr + here + later * channels + columns
            d_x += weight * tl.load(cells, mask=real & (later < left - row), other=0.0)
        tl.store(d_x_ptr + here + places * channels + columns, d_x.to(d_x_ptr.dtype.element_ty), mask=real)
