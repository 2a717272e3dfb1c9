"""Where the fused kernels run: on a GPU with Triton installed. Everywhere else, torch's operations do."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def is_fused(*tensors: Tensor) -> bool:
    """Whether the fused kernels compute with these tensors: they are for bf16; fp32 and fp64 stay with torch."""
    return all(runs_triton(t) and t.dtype == torch.bfloat16 for t in tensors)


def runs_triton(x: Tensor) -> bool:
    return x.is_cuda and _has_triton()


def apply(function: type[Function], *arguments: Any) -> Any:
    """`function.apply`, and its forward alone where no gradient is wanted: for a few tokens, autograd takes longer."""
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(_NoContext(), *arguments)


class _NoContext:
    """Takes what a forward keeps for its backward."""

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
