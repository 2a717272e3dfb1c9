"""The Triton kernels of `lockstep.kernels.slots`, each the other's backward. Import it only where there is a GPU."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_MOST_COLUMNS = 2048


class Spread(torch.autograd.Function):
    """Rows `[R, D]` of tokens `[T, D]`: row `row_TS[t, s]` is token t."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, row_TS: Tensor) -> Tensor:
        ctx.row_TS = row_TS
        return _spread(x_TD, row_TS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows_RD: Tensor) -> tuple[Tensor, None]:
        return _collect(d_rows_RD, ctx.row_TS), None


class Collect(torch.autograd.Function):
    """Sums `[T, D]` of rows `[R, D]`: token t gets rows `row_TS[t]`. Saves nothing that has to be computed again."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, row_TS: Tensor) -> Tensor:
        ctx.row_TS = row_TS
        return _collect(rows_RD, row_TS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sum_TD: Tensor) -> tuple[Tensor, None]:
        return _spread(d_sum_TD, ctx.row_TS), None


def _spread(x_TD: Tensor, row_TS: Tensor) -> Tensor:
    rows_RD = x_TD.new_empty(row_TS.numel(), x_TD.shape[1])
    _launch(_spread_kernel, x_TD.contiguous(), rows_RD, row_TS)
    return rows_RD


def _collect(rows_RD: Tensor, row_TS: Tensor) -> Tensor:
    sum_TD = rows_RD.new_empty(len(row_TS), rows_RD.shape[1])
    _launch(_collect_kernel, rows_RD.contiguous(), sum_TD, row_TS)
    return sum_TD


def _launch(kernel: Any, source: Tensor, target: Tensor, row_TS: Tensor) -> None:
    (tokens, slots), width = row_TS.shape, source.shape[1]
    if tokens == 0:
        return
    block = min(_MOST_COLUMNS, triton.next_power_of_2(width))
    kernel[(tokens, triton.cdiv(width, block))](source, target, row_TS, width, SLOTS=slots, BLOCK=block)


@triton.jit  # type: ignore[untyped-decorator]
def _spread_kernel(x, out, rows, width, SLOTS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + token * width + column, mask=inside)
    for slot in tl.static_range(SLOTS):
        row = tl.load(rows + token * SLOTS + slot).to(tl.int64)
        tl.store(out + row * width + column, value, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _collect_kernel(x, out, rows, width, SLOTS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(SLOTS):
        row = tl.load(rows + token * SLOTS + slot).to(tl.int64)
        total += tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * width + column, total, mask=inside)
