"""Parameters that may be sharded over processes: which part this process holds, and how rank 0 gets the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

Index = tuple[int | slice, ...]
Region = tuple[slice, ...]
"""The part of a tensor between a start and a stop in each of its dims."""
_Item = TypeVar("_Item")


def whole(shape: Sequence[int]) -> Region:
    """All of a tensor of that shape."""
    return tuple(slice(0, size) for size in shape)


def region_shape(region: Region) -> tuple[int, ...]:
    """The shape of `tensor[region]`."""
    return tuple(part.stop - part.start for part in region)


@dataclass(frozen=True)
class Shared:
    """What `parameter[index]` and a process have in common."""

    region: Region
    """Its place in `parameter[index]`."""
    view: Tensor
    """Its place in the process's memory."""


class Holding:
    """The part of a parameter that this process holds; all of it unless the parameter is a DTensor."""

    def __init__(self, parameter: Tensor) -> None:
        self.shape, self.dtype = tuple(parameter.shape), parameter.dtype
        self.is_sharded = isinstance(parameter, DTensor)
        if isinstance(parameter, DTensor):
            (chunk,) = parameter.__create_chunk_list__()  # the question that torch's own checkpoints ask
            self._held = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
            self._local = parameter.to_local().detach()
        else:
            self._held, self._local = whole(self.shape), parameter.detach()

    @classmethod
    def of_nothing(cls, shape: Sequence[int], like: Tensor) -> Holding:
        """Of a parameter that other processes hold, this one none of it; `like` says type and device."""
        holding = cls(torch.empty(0, dtype=like.dtype, device=like.device))
        holding.shape, holding.is_sharded = tuple(shape), True
        holding._held = tuple(slice(0, 0) for _ in shape)
        return holding

    def indexed_shape(self, index: Index) -> tuple[int, ...]:
        """The shape of `parameter[index]`."""
        index = self._padded(index)
        return _indexed(index, region_shape(self._region(index)))

    def shared(self, index: Index) -> Shared | None:
        """What this process holds of `parameter[index]`; None when that is nothing."""
        index = self._padded(index)
        wanted = self._region(index)
        common = tuple(
            slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(self._held, wanted, strict=True)
        )
        if any(part.start >= part.stop for part in common):
            return None
        local = _seen_from(self._held, common)
        picks = tuple(part.start if isinstance(i, int) else part for i, part in zip(index, local, strict=True))
        return Shared(_indexed(index, _seen_from(wanted, common)), self._local[picks])

    def gathered(self, index: Index) -> Tensor:
        """`parameter[index]`. Of a DTensor every process has to ask for it, and rank 0 alone gets it."""
        part = self.shared(index)
        if not self.is_sharded:
            assert part is not None, "a whole parameter holds every part of itself"
            return part.view
        # Whoever holds a byte sends it and everybody else 0, so the largest one is the byte.
        collected = torch.zeros(self.indexed_shape(index), dtype=self.dtype, device=self._local.device)
        if part is not None:
            collected[part.region] = part.view
        dist.reduce(collected.view(-1).view(torch.uint8), dst=0, op=dist.ReduceOp.MAX)
        return collected

    def _padded(self, index: Index) -> Index:
        return index + (slice(None),) * (len(self.shape) - len(index))

    def _region(self, index: Index) -> Region:
        return tuple(
            slice(i, i + 1) if isinstance(i, int) else slice(*i.indices(size))
            for i, size in zip(index, self.shape, strict=True)
        )


def _seen_from(origin: Region, region: Region) -> Region:
    return tuple(slice(b.start - a.start, b.stop - a.start) for a, b in zip(origin, region, strict=True))


def _indexed(index: Index, per_dim: tuple[_Item, ...]) -> tuple[_Item, ...]:
    """Without the dims of which `index` picks one row, as indexing leaves them out."""
    return tuple(item for i, item in zip(index, per_dim, strict=True) if not isinstance(i, int))
