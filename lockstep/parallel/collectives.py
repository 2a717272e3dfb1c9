"""Exchanges of rows between ranks; gradients pass through all but `all_gather_together`.

T rows here, N ranks of the group, D anything behind the first dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

_coalescing_manager: Any = c10d._coalescing_manager  # private, and the same in torch 2.11 to 2.13
# torch 2.13 has new names for them.
_ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def all_gather_rows(x_TD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Everybody's rows in rank order, `[N T, D]`. Its gradient is summed over ranks: each used the rows its own way."""
    result: Tensor = _AllGatherRows.apply(x_TD, group)  # type: ignore[no-untyped-call]
    return result


def all_gather_together(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Everybody's rows of several tensors in one exchange, each in rank order; no gradients.

    They go as bytes: gloo joins what it sends at once, and would make numbers of several types those of one.
    """
    gathered = [x.new_empty(len(x) * group.size(), *x.shape[1:]) for x in tensors]
    with _coalescing_manager(group):
        for out, x in zip(gathered, tensors, strict=True):
            _ALL_GATHER(out.view(torch.uint8), x.contiguous().view(torch.uint8), group=group)
    return gathered


def reduce_scatter_rows(x_TD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's N-th part of the rows, summed over ranks, `[T / N, D]`."""
    result: Tensor = _ReduceScatterRows.apply(x_TD, group)  # type: ignore[no-untyped-call]
    return result


def all_to_all_rows(x_TD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send `sent[n]` rows, part after part, to every rank n, and get `received[n]` from it: `[sum(received), D]`."""
    result: Tensor = _AllToAllRows.apply(x_TD, sent, received, group)  # type: ignore[no-untyped-call]
    return result


def share(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks of parts that do not overlap, for what all ranks go on to compute alike.

    As each rank then has the whole gradient, nothing is exchanged backward.
    """
    result: Tensor = _Share.apply(x, group)  # type: ignore[no-untyped-call]
    return result


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(x_TD, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _scattered_sum(grad, ctx.group), None


class _ReduceScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _scattered_sum(x_TD, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gathered(grad, ctx.group), None


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchanged(x_TD, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grad, ctx.received, ctx.sent, ctx.group), None, None, None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(len(x) * group.size(), *x.shape[1:])
    _ALL_GATHER(out, x.contiguous(), group=group)
    return out


def _scattered_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(len(x) // group.size(), *x.shape[1:])
    _REDUCE_SCATTER(out, x.contiguous(), group=group)
    return out


def _exchanged(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out
