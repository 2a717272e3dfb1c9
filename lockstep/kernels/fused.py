"""Where the fused kernels run: on a GPU with Triton installed. Everywhere else, torch's operations do."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def is_fused(*tensors: Tensor) -> bool:
    """Whether the fused kernels compute with these tensors: they are for bf16; fp32 and fp64 stay with torch."""
    return all(runs_triton(t) and t.dtype == torch.bfloat16 for t in tensors)


def runs_triton(x: Tensor) -> bool:
    return x.is_cuda and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
