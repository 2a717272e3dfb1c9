"""The Triton kernels of `lockstep.kernels.decode_experts`. Import it only where there is a GPU.

Many tokens: slots are sorted by expert, and a program takes some columns of one expert for all of its rows, so that
every weight comes from memory once. An expert with more rows than a tile holds goes through its columns again, which
are in the cache by then. Few tokens: experts hardly meet twice, and every slot goes to its expert alone.

Intermediate results are rounded to bf16 where the separate operations of training round theirs.

T tokens, D model width, E experts, I expert width, J = 2 I, S slots per token, R = T S.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lockstep.kernels.overlap_triton import begin, overlapping


class Tiling(NamedTuple):
    """Columns of a program, inputs of them that it multiplies at once, depth of the pipeline, warps."""

    columns: int
    depth: int
    stages: int
    warps: int


FEW_TOKENS = 4
"""Up to this many, every slot goes alone."""


def _tilings(rows: int) -> tuple[Tiling, Tiling]:
    """Of the first and of the second product, for a tile of so many rows: the fastest of those tried on an H200."""
    if rows <= 32:
        return Tiling(64, 128, 3, 4), Tiling(128, 128, 3, 4)
    return Tiling(64, 64, 3, 4), Tiling(128, 64, 4, 4)


def _tile_rows(slots: int, experts: int) -> int:
    """Rows of a tile: most experts should get no more."""
    rows: int = triton.next_power_of_2(slots * 3 // (2 * experts))
    return max(16, min(128, rows))


def decode_experts_triton(
    x_TD: Tensor,
    experts_TS: Tensor,
    weights_TS: Tensor,
    gate_up_EJD: Tensor,
    down_EDI: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`decode_experts` for contiguous weights."""
    assert all(weight.is_contiguous() for weight in (gate_up_EJD, down_EDI)), "the weights of an expert lie in order"
    x_TD, experts_TS, weights_TS = x_TD.contiguous(), experts_TS.contiguous(), weights_TS.contiguous()
    tokens, slots = experts_TS.shape
    if tokens == 0 or slots == 0 or len(gate_up_EJD) == 0:
        return torch.zeros_like(x_TD, dtype=dtype)
    if tokens <= FEW_TOKENS:
        return one_by_one(x_TD, experts_TS, weights_TS, gate_up_EJD, down_EDI, dtype)
    rows = _tile_rows(tokens * slots, len(gate_up_EJD))
    return sorted_by_expert(x_TD, experts_TS, weights_TS, gate_up_EJD, down_EDI, dtype, rows, *_tilings(rows))


def sorted_by_expert(
    x_TD: Tensor,
    experts_TS: Tensor,
    weights_TS: Tensor,
    gate_up_EJD: Tensor,
    down_EDI: Tensor,
    dtype: torch.dtype,
    tile_rows: int,
    first: Tiling,
    second: Tiling,
) -> Tensor:
    (tokens, slots), width = experts_TS.shape, x_TD.shape[1]
    num_experts, _, inner = down_EDI.shape
    rows = tokens * slots
    order = torch.empty(rows + num_experts + 1, dtype=torch.int32, device=x_TD.device)
    slot_R, starts = order[:rows], order[rows:]
    block, overlap = triton.next_power_of_2(rows), overlapping(x_TD.device)
    _sort[(num_experts,)](
        experts_TS, slot_R, starts, rows, num_experts, BLOCK=block, **overlap,
        num_warps=4 if block < 4096 else 8,
    )  # fmt: skip
    inner_RI = x_TD.new_empty(rows, inner)
    out_RD = x_TD.new_empty(rows, width)
    sizes = {"SLOTS": slots, "WIDTH": width, "INNER": inner, "ROWS": tile_rows, **overlap}
    _gate_up[(num_experts * triton.cdiv(inner, first.columns),)](
        x_TD, gate_up_EJD, weights_TS, slot_R, starts, inner_RI, **sizes,
        COLUMNS=first.columns, DEPTH=first.depth, STAGES=first.stages, num_warps=first.warps,
    )  # fmt: skip
    _down[(num_experts * triton.cdiv(width, second.columns),)](
        inner_RI, down_EDI, slot_R, starts, out_RD, **sizes,
        COLUMNS=second.columns, DEPTH=second.depth, STAGES=second.stages, num_warps=second.warps,
    )  # fmt: skip
    sums_TD = torch.empty_like(x_TD, dtype=dtype)
    columns = min(1024, triton.next_power_of_2(width))
    _collect[(tokens, triton.cdiv(width, columns))](
        out_RD, experts_TS, sums_TD, num_experts, width, SLOTS=slots, COLUMNS=columns, **overlap
    )
    return sums_TD


def one_by_one(
    x_TD: Tensor,
    experts_TS: Tensor,
    weights_TS: Tensor,
    gate_up_EJD: Tensor,
    down_EDI: Tensor,
    dtype: torch.dtype,
    first: Tiling = Tiling(8, 512, 3, 4),
    second: Tiling = Tiling(8, 0, 4, 4),
) -> Tensor:
    (tokens, slots), width = experts_TS.shape, x_TD.shape[1]
    num_experts, _, inner = down_EDI.shape
    inner_RI = x_TD.new_empty(tokens * slots, inner)
    sums_TD = torch.empty_like(x_TD, dtype=dtype)
    sizes = {"EXPERTS": num_experts, "SLOTS": slots, "WIDTH": width, "INNER": inner, **overlapping(x_TD.device)}
    _gate_up_alone[(triton.cdiv(inner, first.columns), tokens * slots)](
        x_TD, gate_up_EJD, experts_TS, weights_TS, inner_RI, **sizes,
        COLUMNS=first.columns, DEPTH=first.depth, STAGES=first.stages, num_warps=first.warps,
    )  # fmt: skip
    _down_alone[(triton.cdiv(width, second.columns), tokens)](
        inner_RI, down_EDI, experts_TS, sums_TD, **sizes,
        COLUMNS=second.columns, DEPTH=triton.next_power_of_2(inner), STAGES=second.stages, num_warps=second.warps,
    )  # fmt: skip
    return sums_TD


@triton.jit  # type: ignore[untyped-decorator]
def _sort(experts, slots, starts, rows, num_experts, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The slots of one expert in order, after those of all experts before it; and where they start."""
    begin(OVERLAPS)
    expert = tl.program_id(0)
    slot = tl.arange(0, BLOCK)
    chosen = tl.load(experts + slot, mask=slot < rows, other=-1).to(tl.int32)
    before = tl.sum(((chosen >= 0) & (chosen < expert)).to(tl.int32), 0)
    is_mine = chosen == expert
    rank = tl.cumsum(is_mine.to(tl.int32), 0)
    tl.store(slots + before + rank - 1, slot, mask=is_mine)
    tl.store(starts + expert, before)
    if expert == num_experts - 1:
        tl.store(starts + num_experts, before + tl.sum(is_mine.to(tl.int32), 0))


@triton.jit  # type: ignore[untyped-decorator]
def _swiglu(gate, up, weight, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    return gate * tl.sigmoid(gate) * up * weight


@triton.jit  # type: ignore[untyped-decorator]
def _gate_up(  # type: ignore[no-untyped-def]
    x_ptr, gate_up, weights, slots, starts, out,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Some columns of one expert for its rows: weighted `silu(gate) * up`, rows in sorted order."""
    begin(OVERLAPS)
    tiles: tl.constexpr = (INNER + COLUMNS - 1) // COLUMNS
    expert = tl.program_id(0) // tiles
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    end = tl.load(starts + expert + 1)
    gates = gate_up + (tl.cast(expert, tl.int64) * 2 * INNER + column) * WIDTH
    for first in range(tl.load(starts + expert), end, ROWS):
        row = first + tl.arange(0, ROWS)
        slot = tl.load(slots + row, mask=row < end, other=0)
        inputs = x_ptr + (slot // SLOTS).to(tl.int64) * WIDTH
        gate = tl.zeros((ROWS, COLUMNS), tl.float32)
        up = tl.zeros((ROWS, COLUMNS), tl.float32)
        for done in tl.range(0, WIDTH, DEPTH, num_stages=STAGES):
            place = done + depth
            x = tl.load(
                inputs[:, None] + place[None, :], mask=(row < end)[:, None] & (place < WIDTH)[None, :], other=0.0
            )
            is_inside = (place < WIDTH)[:, None] & (column < INNER)[None, :]
            w_gate = tl.load(gates[None, :] + place[:, None], mask=is_inside, other=0.0)
            w_up = tl.load(gates[None, :] + INNER * WIDTH + place[:, None], mask=is_inside, other=0.0)
            gate = tl.dot(x, w_gate, gate)
            up = tl.dot(x, w_up, up)
        weight = tl.load(weights + slot, mask=row < end, other=0.0).to(tl.float32)
        result = _swiglu(gate, up, weight[:, None], out.dtype.element_ty)
        cells = out + row.to(tl.int64)[:, None] * INNER + column[None, :]
        tl.store(cells, result.to(out.dtype.element_ty), mask=(row < end)[:, None] & (column < INNER)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _down(  # type: ignore[no-untyped-def]
    x_ptr, down, slots, starts, out,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Some columns of one expert's second product, each row stored at its slot."""
    begin(OVERLAPS)
    tiles: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    expert = tl.program_id(0) // tiles
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    end = tl.load(starts + expert + 1)
    downs = down + (tl.cast(expert, tl.int64) * WIDTH + column) * INNER
    for first in range(tl.load(starts + expert), end, ROWS):
        row = first + tl.arange(0, ROWS)
        inputs = x_ptr + row.to(tl.int64) * INNER
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for done in tl.range(0, INNER, DEPTH, num_stages=STAGES):
            place = done + depth
            x = tl.load(
                inputs[:, None] + place[None, :], mask=(row < end)[:, None] & (place < INNER)[None, :], other=0.0
            )
            is_inside = (place < INNER)[:, None] & (column < WIDTH)[None, :]
            total = tl.dot(x, tl.load(downs[None, :] + place[:, None], mask=is_inside, other=0.0), total)
        slot = tl.load(slots + row, mask=row < end, other=0).to(tl.int64)
        cells = out + slot[:, None] * WIDTH + column[None, :]
        tl.store(cells, total.to(out.dtype.element_ty), mask=(row < end)[:, None] & (column < WIDTH)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _collect(  # type: ignore[no-untyped-def]
    rows, experts, out, num_experts, width, SLOTS: tl.constexpr, COLUMNS: tl.constexpr, OVERLAPS: tl.constexpr
):
    begin(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for slot in tl.static_range(SLOTS):
        expert = tl.load(experts + token * SLOTS + slot)
        is_here = (expert >= 0) & (expert < num_experts)
        row = rows + (token * SLOTS + slot) * width + column
        total += tl.load(row, mask=(column < width) & is_here, other=0.0).to(tl.float32)
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=column < width)


@triton.jit  # type: ignore[untyped-decorator]
def _gate_up_alone(  # type: ignore[no-untyped-def]
    x_ptr, gate_up, experts, weights, out,
    EXPERTS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Some columns of one slot's first product."""
    begin(OVERLAPS)
    slot = tl.program_id(1)
    expert = tl.load(experts + slot).to(tl.int64)
    if (expert >= 0) & (expert < EXPERTS):
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        depth = tl.arange(0, DEPTH)
        inputs = x_ptr + (slot // SLOTS).to(tl.int64) * WIDTH
        gates = gate_up + (expert * 2 * INNER + column) * WIDTH
        gate = tl.zeros((COLUMNS, DEPTH), tl.float32)
        up = tl.zeros((COLUMNS, DEPTH), tl.float32)
        for done in tl.range(0, WIDTH, DEPTH, num_stages=STAGES):
            place = done + depth
            x = tl.load(inputs + place, mask=place < WIDTH, other=0.0).to(tl.float32)[None, :]
            is_inside = (place < WIDTH)[None, :] & (column < INNER)[:, None]
            cells = gates[:, None] + place[None, :]
            gate += x * tl.load(cells, mask=is_inside, other=0.0).to(tl.float32)
            up += x * tl.load(cells + INNER * WIDTH, mask=is_inside, other=0.0).to(tl.float32)
        weight = tl.load(weights + slot).to(tl.float32)
        result = _swiglu(tl.sum(gate, 1), tl.sum(up, 1), weight, out.dtype.element_ty)
        cells = out + tl.cast(slot, tl.int64) * INNER + column
        tl.store(cells, result.to(out.dtype.element_ty), mask=column < INNER)


@triton.jit  # type: ignore[untyped-decorator]
def _down_alone(  # type: ignore[no-untyped-def]
    x_ptr, down, experts, out,
    EXPERTS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Some columns of one token's second product, over all of its slots in order."""
    begin(OVERLAPS)
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.arange(0, DEPTH)
    is_inside = (place < INNER)[None, :] & (column < WIDTH)[:, None]
    total = tl.zeros((COLUMNS,), tl.float32)
    for number in tl.range(0, SLOTS, num_stages=STAGES):
        slot = token * SLOTS + number
        expert = tl.load(experts + slot).to(tl.int64)
        is_here = (expert >= 0) & (expert < EXPERTS)
        x = tl.load(x_ptr + slot * INNER + place, mask=(place < INNER) & is_here, other=0.0).to(tl.float32)
        cells = down + (expert * WIDTH + column)[:, None] * INNER + place[None, :]
        w = tl.load(cells, mask=is_inside & is_here, other=0.0).to(tl.float32)
        total += tl.sum(w * x[None, :], 1).to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out + token * WIDTH + column, total.to(out.dtype.element_ty), mask=column < WIDTH)
