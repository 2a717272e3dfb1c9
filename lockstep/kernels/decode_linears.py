"""Linear layers and routing for the few rows of a decoding step, with few launches.

T rows, D width in, O width out, I inner width, E experts, S slots per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from lockstep.kernels.fused import is_fused
from lockstep.kernels.swiglu import swiglu

MOST_ROWS = 16
"""Above this, cuBLAS is as fast or faster."""


def _fits(x_TD: Tensor, *weights: Tensor) -> bool:
    return len(x_TD) <= MOST_ROWS and not torch.is_grad_enabled() and is_fused(x_TD, *weights)


def linears(x_TD: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """`x @ weight.T` for each of up to three weights `[O, D]`, without gradients. On a GPU few rows take one launch; of
    more the products go side by side, because those of some hundred rows do not fill it alone."""
    if _fits(x_TD, *weights) and (len(x_TD) == 1 or len(weights) > 1):
        from lockstep.kernels.decode_linears_triton import linears_triton

        return linears_triton(x_TD, weights)
    return _side_by_side(x_TD, weights) if x_TD.is_cuda else [F.linear(x_TD, weight) for weight in weights]


def _side_by_side(x_TD: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    here = torch.cuda.current_stream()
    # What one of these streams reuses was read before: its next work follows all that this stream has done until then.
    streams = [_stream(x_TD.device, number) for number in range(len(weights) - 1)]
    found = []
    for stream, weight in zip(streams, weights[1:], strict=True):
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            found.append(F.linear(x_TD, weight))
    found.insert(0, F.linear(x_TD, weights[0]))
    for stream in streams:
        here.wait_stream(stream)
    return found


@cache
def _stream(device: torch.device, number: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def swiglu_linear(x_TD: Tensor, gate_ID: Tensor, up_ID: Tensor) -> Tensor:
    """`silu(x @ gate.T) * (x @ up.T)`, `[T, I]`; for few rows in one launch, without gradients."""
    if _fits(x_TD, gate_ID, up_ID):
        from lockstep.kernels.decode_linears_triton import swiglu_linear_triton

        return swiglu_linear_triton(x_TD, gate_ID, up_ID)
    gate_TI, up_TI = linears(x_TD, [gate_ID, up_ID])
    return swiglu(gate_TI, up_TI)
