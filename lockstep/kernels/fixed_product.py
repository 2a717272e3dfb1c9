"""Matrix products in which a row's bits do not depend on the rows beside it: every tile has one shape.

Libraries choose how to add up by the number of rows. Here rows are cut into tiles of one size, the last one filled with
zeros, so one row is multiplied as 16,384 are. Gradients are ordinary products: nobody computes them twice.

T rows, D width in, O width out, E experts, R rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lockstep.kernels.fused import apply, is_fused

ROWS = 32
"""Rows of a tile on a CPU."""

_ALIGNMENT = 64
"""Bytes: what BLAS adds up first may depend on where a matrix begins."""


def fixed_product(x_TD: Tensor, weight_OD: Tensor) -> Tensor:
    """`x @ weight.T`, `[T, O]`."""
    product: Tensor = apply(_FixedProduct, x_TD, weight_OD)
    return product


def fixed_grouped_product(x_RD: Tensor, weight_EOD: Tensor, ends_E: Tensor) -> Tensor:
    """Each row times the matrix of its expert, `[R, O]`; expert e has the rows before `ends_E[e]`, int32.

    On a GPU the launches depend on shapes alone. A row's bits do not depend on how many rows its expert has.
    """
    product: Tensor = apply(_FixedGroupedProduct, x_RD, weight_EOD, ends_E)
    return product


class _FixedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_OD: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_OD)
        if is_fused(x_TD, weight_OD):
            from lockstep.kernels.fixed_product_triton import multiply

            return multiply(x_TD, weight_OD[None], None)
        return _in_tiles(x_TD, weight_OD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_OD = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        return grad_TO @ weight_OD if needs_x else None, grad_TO.T @ x_TD if needs_weight else None


class _FixedGroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, weight_EOD: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_RD, weight_EOD, ends_E)
        if is_fused(x_RD, weight_EOD):
            from lockstep.kernels.fixed_product_triton import multiply

            return multiply(x_RD, weight_EOD, ends_E)
        out_RO = x_RD.new_empty(len(x_RD), weight_EOD.shape[1])
        for expert, rows in _expert_rows(ends_E):
            out_RO[rows] = _in_tiles(x_RD[rows], weight_EOD[expert])
        return out_RO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, weight_EOD, ends_E = ctx.saved_tensors
        if is_fused(x_RD, weight_EOD):
            grad_RO = grad_RO.contiguous()
            grad_x_RD = F.grouped_mm(grad_RO, weight_EOD, offs=ends_E)
            return grad_x_RD, F.grouped_mm(grad_RO.T, x_RD, offs=ends_E), None
        grad_x_RD, grad_weight_EOD = torch.empty_like(x_RD), torch.zeros_like(weight_EOD)
        for expert, rows in _expert_rows(ends_E):
            grad_x_RD[rows] = grad_RO[rows] @ weight_EOD[expert]
            grad_weight_EOD[expert] = grad_RO[rows].T @ x_RD[rows]
        return grad_x_RD, grad_weight_EOD, None


def _expert_rows(ends_E: Tensor) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, with their rows."""
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


def _in_tiles(x_TD: Tensor, weight_OD: Tensor) -> Tensor:
    """The specification: one call of BLAS for each tile, all of one shape."""
    padded = F.pad(x_TD, (0, 0, 0, -len(x_TD) % ROWS)).contiguous()
    if padded.data_ptr() % _ALIGNMENT:
        padded = padded.clone()
    out = padded.new_empty(len(padded), len(weight_OD))
    for tile, result in zip(padded.split(ROWS), out.split(ROWS), strict=True):
        torch.mm(tile, weight_OD.T, out=result)
    return out[: len(x_TD)]
