"""The optimizer over shards: it updates this rank's numbers, and agrees with all ranks on the gradient's norm."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lockstep.config import OptimizerOptions
from lockstep.kernels.adamw import BLOCK, num_blocks
from lockstep.parallel.shard import ShardedParameter
from lockstep.trainer.blocks import CUT
from lockstep.trainer.optimizer import Optimizer
from lockstep.trainer.optimizer.gradients import Gradients
from lockstep.trainer.optimizer.host_memory import host_memory_left, require_host_memory


class ShardGradients(Gradients):
    """Sums of the gradients of this rank's numbers."""

    def __init__(self, shards: Mapping[str, ShardedParameter], *, accumulate: torch.dtype, keep: torch.dtype) -> None:
        super().__init__({}, accumulate=accumulate, keep=keep)
        self._shards = shards
        for name, shard in shards.items():
            shard.stored.register_post_accumulate_grad_hook(partial(self._take_off, name))

    def _take_off(self, name: str, stored: Tensor) -> None:
        """FSDP has reduced the gradient over data-parallel ranks."""
        grad, stored.grad = stored.grad, None
        assert isinstance(grad, DTensor)
        local = nn.Parameter(self._shards[name].local, requires_grad=True)
        local.grad = grad.to_local()
        self._add(name, local)

    def take_part(self, name: str, grad: Tensor) -> None:
        """All of a gradient, already summed over data-parallel ranks."""
        assert name not in self._sums
        self._sums[name] = grad

    @torch.no_grad()
    def settle(self, names: Iterable[str]) -> None:
        """As `Gradients.settle`, after summing up what ranks have each a share of."""
        here = [name for name in names if name in self._sums]
        for name in here:
            for group in self._shards[name].sum_over:
                dist.all_reduce(self._sums[name], group=group)
        super().settle(here)

    @torch.no_grad()
    def norm(self) -> float:
        """Over the whole model, every number counted once."""
        self.settle([name for name in self._sums if name not in self._norms])
        square = torch.zeros((), dtype=torch.float64, device=self._device)
        for name, norm in self._norms.items():
            if self._shards[name].is_counted_here:
                square += norm.double() ** 2
        dist.all_reduce(square)
        return math.sqrt(float(square))

    @property
    def _device(self) -> torch.device:
        return next((shard.local.device for shard in self._shards.values()), torch.device("cpu"))


class ShardOptimizer(Optimizer):
    """`Optimizer` of this rank's numbers; parameters of which it has none are left out."""

    def __init__(self, shards: list[ShardedParameter], options: OptimizerOptions, *, settles: bool = False) -> None:
        self.shards = {shard.name: shard for shard in shards if shard.local.numel() > 0}
        local: Any = _Locals({name: shard.local for name, shard in self.shards.items()})
        super().__init__(local, options)
        main_grads = torch.bfloat16 if options.main_grads_dtype == "bf16" else torch.float32
        accumulate = torch.float32 if settles else main_grads
        self.gradients: ShardGradients = ShardGradients(self.shards, accumulate=accumulate, keep=main_grads)

    def _require_host_memory(self, needed: int) -> None:
        require_host_memory_of_all(needed)

    def sharded_state(self) -> Iterator[tuple[str, Tensor]]:
        """`named_state`, with every tensor placed in that of the whole model.

        Where shards end inside a block of 8-bit moments, the name of its scale says over how many ranks: the numbers
        of one layout mean nothing in another.
        """
        for name, tensor in self.named_state():
            shard = self._shard_of(name)
            if shard is None or tensor.shape == shard.local.shape:
                yield name, tensor if shard is None else _placed_like(tensor, shard, shard.stored.shape[-1])
                continue
            width, parts = shard.stored.shape[-1], _num_parts(shard.stored)
            part = -(-width // parts)
            if parts == 1 or part % BLOCK == 0:
                yield name, _placed_like(tensor, shard, num_blocks(width))
            else:
                yield f"{name}{CUT}{parts}", _placed_like(tensor, shard, parts * num_blocks(part))

    def _shard_of(self, state_name: str) -> ShardedParameter | None:
        parts = state_name.split(".")
        return next(
            (self.shards[rest] for i in range(len(parts)) if (rest := ".".join(parts[i:])) in self.shards), None
        )


def require_host_memory_of_all(needed: int) -> None:
    """As `require_host_memory`, for what the ranks of a machine need together.

    Called by all ranks before any of them allocates, and all of them fail alike.
    """
    everybody: list[tuple[str, int, int]] = [("", 0, 0)] * dist.get_world_size()
    dist.all_gather_object(everybody, (socket.gethostname(), needed, host_memory_left()))
    for machine in dict.fromkeys(name for name, _, _ in everybody):
        here = [(size, left) for name, size, left in everybody if name == machine]
        together = sum(size for size, _ in here)
        if together:
            require_host_memory(together, left=min(left for _, left in here), num_ranks=len(here))


class _Locals:
    """What the optimizer wants of a model."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        self._parameters = {name: nn.Parameter(tensor) for name, tensor in parameters.items()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._parameters.items()


def _placed_like(tensor: Tensor, shard: ShardedParameter, width: int) -> Tensor:
    """A state tensor as a DTensor, divided like its parameter, but of this width."""
    shape = torch.Size((*shard.stored.shape[:-1], width))
    stride = torch.empty(shape, device="meta").stride()
    mesh, placements = shard.stored.device_mesh, shard.stored.placements
    placed: Tensor = DTensor.from_local(tensor, mesh, placements, run_check=False, shape=shape, stride=stride)
    return placed


def _num_parts(stored: DTensor) -> int:
    """Over how many ranks the last dim is divided."""
    last = stored.dim() - 1
    sizes = zip(stored.device_mesh.shape, stored.placements, strict=True)
    return math.prod(size for size, placement in sizes if getattr(placement, "dim", None) == last)
