"""One layer's weights whole on every rank for all micro-batches of a step, and its gradients reduced once.

FSDP gathers a unit's weights whenever it computes, and reduces gradients whenever it has computed backward. A backward
that finishes one layer at a time wants either only once, and the sum of all micro-batches in fp32 before that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Shard

from lockstep.models import LanguageModel
from lockstep.parallel.local import local_part
from lockstep.parallel.shard import ShardedParameter


class GatheredLayers:
    """Parts of a sharded model, gathered as long as it is told to; what backward leaves on them adds up here.

    Args:
        take: gets the name of a parameter and, in fp32, this rank's part of its gradient, summed over data-parallel
            ranks.
    """

    def __init__(
        self, model: LanguageModel, shards: Mapping[str, ShardedParameter], take: Callable[[str, Tensor], None]
    ) -> None:
        self._model = model
        self._take = take
        self._stored = {name: shard.stored for name, shard in shards.items()}
        self._name_of = {module: name for name, module in model.named_modules()}
        self._in_blocks = {module for block in model.model.layers.values() for module in block.modules()}
        self._sums: dict[str, Tensor] = {}

    @contextmanager
    def gathered(self, part: nn.Module) -> Iterator[None]:
        """All weights of a block, or those of the model outside its blocks."""
        _make_root(self._model)
        modules = [m for m in part.modules() if part is not self._model or m not in self._in_blocks]
        units = [module for module in modules if isinstance(module, FSDPModule)]
        for unit in units:
            _reshard_by_itself(unit, after_forward=False, after_backward=False)
            unit.unshard()
        hooks = [p.register_post_accumulate_grad_hook(partial(self._add, name)) for p, name in self._names(modules)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for unit in units:
                _reshard_by_itself(unit, after_forward=part is not self._model, after_backward=True)
                unit.reshard()

    @torch.no_grad()
    def reduce(self, names: Iterable[str]) -> None:
        """Nothing more comes for these parameters: hand this rank's parts of their sums over."""
        for name in names:
            grad, stored = self._sums.pop(name), self._stored[name]
            whole = DTensor.from_local(grad, stored.device_mesh["fsdp"], [Partial()], run_check=False)
            part = whole.redistribute(placements=[Shard(0)]).to_local()
            if part.numel():
                self._take(name, part)

    def _names(self, modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Parameter, str]]:
        """Every parameter once, by the first of its names."""
        seen: set[nn.Parameter] = set()
        for module in modules:
            for name, parameter in module.named_parameters(recurse=False):
                if parameter not in seen:
                    seen.add(parameter)
                    yield parameter, f"{self._name_of[module]}.{name}"

    def _add(self, name: str, parameter: Tensor) -> None:
        grad, parameter.grad = parameter.grad, None
        assert grad is not None
        local = local_part(grad)
        if name in self._sums:
            self._sums[name].add_(local)
        else:
            self._sums[name] = local.float().contiguous()


def _make_root(model: LanguageModel) -> None:
    """FSDP takes the first unit that computes for the whole model; blocks are about to compute on their own."""
    assert isinstance(model, FSDPModule)
    model._get_fsdp_state()._lazy_init()


def _reshard_by_itself(unit: FSDPModule, *, after_forward: bool, after_backward: bool) -> None:
    unit.set_reshard_after_forward(after_forward, recurse=False)
    unit.set_reshard_after_backward(after_backward, recurse=False)
