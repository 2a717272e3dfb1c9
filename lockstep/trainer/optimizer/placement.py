"""Which optimizer state there is, where it lives and how many bytes it takes; known before anything is allocated.

Bytes per parameter:

    weight    master                          moments fp32   bf16   8-bit
    fp32      the weight itself                          8      4    2.06
    bf16      weight + 2 bytes of remainder             10      6    4.06

**Qwen3-30B-A3B on one GPU of 141 GB with 128 GiB of host memory** (30.53 billion parameters, bf16, 8-bit moments):

    on the GPU, in GB                     when backward ends   during the update
    weights                                             61.1                61.1
    gradients in bf16                                   61.1   61.1, freed one by one
    state that is not offloaded (12 %)                  14.9                14.9
    five streaming buffers                               0.7                 0.7
    sum                                                137.8               137.8

    in host memory, in GB: 88 % of 124.0, pinned       109.1

The GPU has 150 GB, so 12 GB are left at the end of backward for one layer's activations and fp32 gradients (2.5 GB).
Of the host's 137 GB the system leaves 134, so 25 are left for the process itself; all of the state, 124 GB, would leave
10. With master and moments in fp32 the state would be 305 GB.

The gradients must never all be fp32: with several micro-batches that takes a backward which finishes one layer at a
time (`Gradients.settle`). The inputs of its layers (0.54 GB a layer for 131 thousand tokens) go as the gradients of
layers (1.27 GB) come, so its end is the peak.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lockstep.config import OptimizerOptions
from lockstep.kernels.adamw import MomentDtype, state_layout

SMALLEST_OFFLOADED = 2**18
"""Numbers in a weight from which on its state may leave the device; below, a copy costs more than it saves."""

Layout = dict[str, tuple[torch.Size, torch.dtype]]
"""Shape and type of a weight's state tensors, by name."""


@dataclass(frozen=True)
class Placement:
    """The state tensors of every weight, and the weights whose state lives in host memory."""

    layouts: dict[str, Layout]
    on_host: frozenset[str]

    @property
    def host_bytes(self) -> int:
        return sum(layout_bytes(layout) for name, layout in self.layouts.items() if name in self.on_host)

    @property
    def device_bytes(self) -> int:
        return sum(layout_bytes(layout) for name, layout in self.layouts.items() if name not in self.on_host)


def layout_bytes(layout: Layout) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())


def place_state(parameters: Mapping[str, Tensor], options: OptimizerOptions) -> Placement:
    """Decide by shapes and types alone; parameters on the meta device will do.

    Weights are offloaded from the model's end until their numbers are `optimizer_offload_fraction` of all: what stays
    is updated first, without waiting for the link, and is what the next forward needs first.
    """
    layouts = {
        name: {
            key: (shape, dtype)
            for key, shape, dtype in state_layout(
                p.shape, p.dtype, _format(p, options.exp_avg_dtype), _format(p, options.exp_avg_sq_dtype)
            )
        }
        for name, p in parameters.items()
    }
    on_host = frozenset(_last_share(parameters, options.optimizer_offload_fraction))
    return Placement(layouts, on_host if options.optimizer_cpu_offload else frozenset())


def _format(parameter: Tensor, wanted: MomentDtype) -> MomentDtype:
    """Vectors keep fp32 in place of 8 bits: they are tiny, and ranks cut them inside the blocks that share a scale."""
    return "fp32" if wanted == "8bit" and parameter.dim() == 1 else wanted


def _last_share(parameters: Mapping[str, Tensor], fraction: float) -> Iterator[str]:
    wanted = fraction * sum(p.numel() for p in parameters.values())
    chosen = 0
    for name, parameter in reversed(list(parameters.items())):
        if parameter.numel() >= SMALLEST_OFFLOADED and chosen + parameter.numel() <= wanted:
            chosen += parameter.numel()
            yield name
