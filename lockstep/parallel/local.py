"""DTensors for storage, plain tensors for compute.

While a unit of FSDP computes, its parameters are gathered over data parallelism but still DTensors over the tensor or
expert mesh. Layers know nothing of that: for the time of their forward they see this rank's plain part instead. The
gradient of a part is taken as it is; where all ranks hold the whole, it is summed over them once per step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Views = dict[tuple[nn.Module, str], Callable[[Tensor], Tensor]]
"""(module, parameter name) -> what this rank computes with, from what it stores."""


def compute_on_local_tensors(unit: nn.Module, views: Views, *, without: set[nn.Module]) -> None:
    """Let the unit's forward see plain tensors in place of its parameters that are DTensors over other meshes.

    Args:
        without: modules inside it that are units of their own.
    """
    inner = {module for nested in without for module in nested.modules()}
    entries = [(module, name) for module in unit.modules() if module not in inner for name in module._parameters]
    forward = unit.forward

    def local_forward(*args: object) -> object:
        with _plain_parameters(entries, views):
            return forward(*args)

    unit.forward = local_forward


def local_part(parameter: Tensor) -> Tensor:
    """The plain tensor of this rank, with its gradient."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@contextmanager
def _plain_parameters(entries: list[tuple[nn.Module, str]], views: Views) -> Iterator[None]:
    """Attributes of an instance are found before its parameters, so they can stand in for them."""
    shadowed: list[tuple[nn.Module, str]] = []
    try:
        for module, name in entries:
            parameter: Tensor | None = module._parameters[name]
            view = views.get((module, name))
            if parameter is not None and (view is not None or isinstance(parameter, DTensor)):
                local = local_part(parameter)
                module.__dict__[name] = local if view is None else view(local)
                shadowed.append((module, name))
        yield
    finally:
        for module, name in shadowed:
            del module.__dict__[name]
