"""The Triton kernel of `lockstep.kernels.fixed_product`. Import it only where there is a GPU.

One tile shape, one order over the width, one instruction, for a single row as for a whole pack. Neither the number of
rows nor a row's place in its tile enters its sums.

R rows, D width in, O width out, E matrices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, DEPTH = 64, 64, 64
"""Of a tile: rows of `x`, rows of the matrix, and how much of their width is multiplied at once."""

_TILES_TOGETHER = 16
"""Row tiles that run through all columns before the next ones do: what they read stays in the cache."""


def multiply(x_RD: Tensor, weight_EOD: Tensor, ends_E: Tensor | None) -> Tensor:
    """Rows times their matrix, the first if `ends_E` is None; else matrix e has the rows before `ends_E[e]`."""
    x_RD, weight_EOD = x_RD.contiguous(), weight_EOD.contiguous()
    num_experts, width_out, width_in = weight_EOD.shape
    num_rows = len(x_RD)
    out_RO = torch.empty((num_rows, width_out), dtype=x_RD.dtype, device=x_RD.device)
    if num_rows == 0:
        return out_RO
    tiles = triton.cdiv(num_rows, ROWS)
    if ends_E is not None:  # every expert may end with a tile that is not full
        tiles = min(num_rows, tiles + num_experts - 1)
    _multiply[(tiles * triton.cdiv(width_out, COLUMNS),)](
        x_RD, weight_EOD, x_RD if ends_E is None else ends_E, out_RO, num_rows, tiles, width_out, width_in,
        IS_GROUPED=ends_E is not None, EXPERTS=num_experts, EXPERTS_BLOCK=triton.next_power_of_2(num_experts),
        ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH, TOGETHER=_TILES_TOGETHER, num_warps=4, num_stages=4,
    )  # fmt: skip
    return out_RO


@triton.jit(do_not_specialize=["num_rows", "tiles"])  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]
    x, weight, ends, out, num_rows, tiles, width_out, width_in,
    IS_GROUPED: tl.constexpr, EXPERTS: tl.constexpr, EXPERTS_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    round_of = TOGETHER * tl.cdiv(width_out, COLUMNS)
    first_tile = number // round_of * TOGETHER
    together = tl.minimum(tiles - first_tile, TOGETHER)
    tile = first_tile + number % round_of % together
    first_column = number % round_of // together * COLUMNS
    first, end, matrix = tile * ROWS, num_rows, weight
    if IS_GROUPED:
        expert = tl.arange(0, EXPERTS_BLOCK)
        end_E = tl.load(ends + expert, mask=expert < EXPERTS, other=0)
        begin_E = tl.load(ends + expert - 1, mask=(expert > 0) & (expert < EXPERTS), other=0)
        tiles_E = tl.cdiv(end_E - begin_E, ROWS)
        last_E = tl.cumsum(tiles_E, 0)
        mine = tl.sum(((last_E <= tile) & (expert < EXPERTS)).to(tl.int32), 0)
        matrix = weight + mine.to(tl.int64) * width_out * width_in
        is_mine = expert == mine
        first = tl.sum(tl.where(is_mine, begin_E + (tile - last_E + tiles_E) * ROWS, 0), 0)
        end = tl.sum(tl.where(is_mine & (expert < EXPERTS), end_E, 0), 0)
    if first < end:
        row = first + tl.arange(0, ROWS)
        column = first_column + tl.arange(0, COLUMNS)
        depth = tl.arange(0, DEPTH)
        lines = x + row[:, None].to(tl.int64) * width_in + depth[None, :]
        columns = matrix + column[None, :].to(tl.int64) * width_in + depth[:, None]
        is_row, is_column = row[:, None] < end, column[None, :] < width_out
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in tl.range(0, width_in, DEPTH):
            left = tl.load(lines + start, mask=is_row & (start + depth[None, :] < width_in), other=0.0)
            right = tl.load(columns + start, mask=is_column & (start + depth[:, None] < width_in), other=0.0)
            total = tl.dot(left, right, total)
        at = row[:, None].to(tl.int64) * width_out + column[None, :]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=is_row & is_column)
