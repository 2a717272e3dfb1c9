"""The Triton kernels of `lockstep.kernels.decode_linears`. Import it only where there is a GPU.

With few rows a product takes as long as its weights take to arrive. One row is multiplied and summed by plain
arithmetic; more go through the tensor cores. The first weights are on their way before the rows are there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lockstep.kernels.overlap_triton import let_next_come, num_multiprocessors, overlapping, wait_for_all_before


def _tiling(rows: int, sizes: Sequence[int], device: torch.device) -> dict[str, int]:
    """Rows and columns of a program, inputs of them at once, depth of the pipeline, warps.

    Fewer columns where multiprocessors would get unequal numbers of programs: the one with most is waited for.
    """
    columns = 8 if rows == 1 else 32
    if _evenness(sizes, columns, device) < 0.9 and _evenness(sizes, columns // 2, device) > 0.9:
        columns //= 2
    if rows == 1:
        return {"ROWS": 1, "COLUMNS": columns, "DEPTH": 512, "STAGES": 4, "num_warps": 4}
    return {"ROWS": 16, "COLUMNS": columns, "DEPTH": 128, "STAGES": 4, "num_warps": 4}


def _evenness(sizes: Sequence[int], columns: int, device: torch.device) -> float:
    """Programs of all multiprocessors over what they were if all had as many as the busiest."""
    programs, places = sum(triton.cdiv(size, columns) for size in sizes), num_multiprocessors(device)
    return float(programs / (triton.cdiv(programs, places) * places))


def linears_triton(x_TD: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """`linears` for up to three contiguous weights and 16 rows."""
    return linears_with(x_TD, weights, **_tiling(len(x_TD), [len(weight) for weight in weights], x_TD.device))


def linears_with(x_TD: Tensor, weights: Sequence[Tensor], **tiling: int) -> list[Tensor]:
    assert 1 <= len(weights) <= 3, "the kernel takes up to three weights"
    assert all(weight.is_contiguous() for weight in weights), "a weight's inputs lie in order"
    rows, width = x_TD.shape
    outs = [x_TD.new_empty(rows, len(weight)) for weight in weights]
    if rows == 0:
        return outs
    weights, missing = list(weights), 3 - len(weights)
    sizes = [len(weight) for weight in weights] + [0] * missing
    programs = sum(triton.cdiv(size, tiling["COLUMNS"]) for size in sizes)
    _linears[(programs,)](
        x_TD.contiguous(), *weights, *weights[:1] * missing, *outs, *outs[:1] * missing, *sizes, rows,
        WIDTH=width, **overlapping(x_TD.device), **tiling,
    )  # fmt: skip
    return outs


def swiglu_linear_triton(x_TD: Tensor, gate_ID: Tensor, up_ID: Tensor) -> Tensor:
    """`swiglu_linear` for contiguous weights and up to 16 rows."""
    return swiglu_linear_with(x_TD, gate_ID, up_ID, **_tiling(len(x_TD), [len(gate_ID)], x_TD.device))


def swiglu_linear_with(x_TD: Tensor, gate_ID: Tensor, up_ID: Tensor, **tiling: int) -> Tensor:
    assert all(weight.is_contiguous() for weight in (gate_ID, up_ID)), "a weight's inputs lie in order"
    (rows, width), inner = x_TD.shape, len(gate_ID)
    out_TI = x_TD.new_empty(rows, inner)
    if rows:
        _swiglu_linear[(triton.cdiv(inner, tiling["COLUMNS"]),)](
            x_TD.contiguous(), gate_ID, up_ID, out_TI, rows, inner,
            WIDTH=width, **overlapping(x_TD.device), **tiling,
        )  # fmt: skip
    return out_TI


@triton.jit  # type: ignore[untyped-decorator]
def _products(  # type: ignore[no-untyped-def]
    x_ptr, one, other, row, column, width_out, rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    IS_PAIR: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Some columns `[ROWS, COLUMNS]` of the products with one weight, and with another (or with the one again)."""
    depth = tl.arange(0, DEPTH)
    ones = one + column.to(tl.int64) * WIDTH
    others = other + column.to(tl.int64) * WIDTH
    if ROWS == 1:
        is_inside = (depth < WIDTH)[None, :] & (column < width_out)[:, None]
        w = tl.load(ones[:, None] + depth[None, :], mask=is_inside, other=0.0)
        if IS_PAIR:
            w_other = tl.load(others[:, None] + depth[None, :], mask=is_inside, other=0.0)
        wait_for_all_before(OVERLAPS)
        x = tl.load(x_ptr + depth, mask=depth < WIDTH, other=0.0).to(tl.float32)[None, :]
        wide = x * w.to(tl.float32)
        wide_other = tl.zeros((COLUMNS, DEPTH), tl.float32)
        if IS_PAIR:
            wide_other = x * w_other.to(tl.float32)
        for done in tl.range(DEPTH, WIDTH, DEPTH, num_stages=STAGES):
            place = done + depth
            x = tl.load(x_ptr + place, mask=place < WIDTH, other=0.0).to(tl.float32)[None, :]
            is_inside = (place < WIDTH)[None, :] & (column < width_out)[:, None]
            wide += x * tl.load(ones[:, None] + place[None, :], mask=is_inside, other=0.0).to(tl.float32)
            if IS_PAIR:
                wide_other += x * tl.load(others[:, None] + place[None, :], mask=is_inside, other=0.0).to(tl.float32)
        total, total_other = tl.sum(wide, 1)[None, :], tl.sum(wide_other, 1)[None, :]
    else:
        is_inside = (depth < WIDTH)[:, None] & (column < width_out)[None, :]
        w = tl.load(ones[None, :] + depth[:, None], mask=is_inside, other=0.0)
        if IS_PAIR:
            w_other = tl.load(others[None, :] + depth[:, None], mask=is_inside, other=0.0)
        wait_for_all_before(OVERLAPS)
        x = tl.load(x_ptr + row * WIDTH + depth[None, :], mask=(row < rows) & (depth < WIDTH)[None, :], other=0.0)
        total = tl.dot(x, w)
        total_other = tl.zeros((ROWS, COLUMNS), tl.float32)
        if IS_PAIR:
            total_other = tl.dot(x, w_other)
        for done in tl.range(DEPTH, WIDTH, DEPTH, num_stages=STAGES):
            place = done + depth
            x = tl.load(
                x_ptr + row * WIDTH + place[None, :],
                mask=(row < rows) & (place < WIDTH)[None, :],
                other=0.0,
            )
            is_inside = (place < WIDTH)[:, None] & (column < width_out)[None, :]
            total = tl.dot(x, tl.load(ones[None, :] + place[:, None], mask=is_inside, other=0.0), total)
            if IS_PAIR:
                next_other = tl.load(others[None, :] + place[:, None], mask=is_inside, other=0.0)
                total_other = tl.dot(x, next_other, total_other)
    return total, total_other


@triton.jit  # type: ignore[untyped-decorator]
def _linears(  # type: ignore[no-untyped-def]
    x_ptr, weight_0, weight_1, weight_2, out_0, out_1, out_2, size_0, size_1, size_2, rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    let_next_come(OVERLAPS)
    number = tl.program_id(0)
    weight, out, size = weight_0, out_0, size_0
    past_0 = tl.cdiv(size_0, COLUMNS)
    past_1 = past_0 + tl.cdiv(size_1, COLUMNS)
    if number >= past_1:
        weight, out, size = weight_2, out_2, size_2
        number -= past_1
    elif number >= past_0:
        weight, out, size = weight_1, out_1, size_1
        number -= past_0
    column = number * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)[:, None]
    total, _ = _products(
        x_ptr, weight, weight, row, column, size, rows, WIDTH, ROWS, COLUMNS, DEPTH, STAGES, False, OVERLAPS
    )
    inside = (row < rows) & (column < size)[None, :]
    tl.store(out + row * size + column[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _swiglu_linear(  # type: ignore[no-untyped-def]
    x_ptr, gate_weight, up_weight, out, rows, inner,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    let_next_come(OVERLAPS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)[:, None]
    gate, up = _products(
        x_ptr, gate_weight, up_weight, row, column, inner, rows, WIDTH, ROWS, COLUMNS, DEPTH, STAGES, True, OVERLAPS
    )
    gate, up = gate.to(out.dtype.element_ty).to(tl.float32), up.to(out.dtype.element_ty).to(tl.float32)
    inside = (row < rows) & (column < inner)[None, :]
    result = gate * tl.sigmoid(gate) * up
    tl.store(out + row * inner + column[None, :], result.to(out.dtype.element_ty), mask=inside)
