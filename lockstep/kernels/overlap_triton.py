"""Kernels that may start while the one before them ends. Import it only where there is a GPU.

In a decoding step many kernels take less time than their launches. On GPUs since Hopper a kernel that was launched with
`overlapping` is placed on the multiprocessors early, and waits in `begin` until everything before it is written.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@cache
def _can_overlap(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def num_multiprocessors(device: torch.device) -> int:
    """3 stand for those of a CPU, on which kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def overlapping(device: torch.device) -> dict[str, Any]:
    """Arguments for the launch of a kernel whose first statement is `begin(OVERLAPS)`."""
    return {"OVERLAPS": True, "launch_pdl": True} if _can_overlap(device) else {"OVERLAPS": False}


@triton.jit  # type: ignore[untyped-decorator]
def begin(OVERLAPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Let the next kernel come, and wait for all before. Every program of a kernel must call it, or its two halves,
    before anything else: then the end of a kernel means the end of all kernels before it."""
    let_next_come(OVERLAPS)
    wait_for_all_before(OVERLAPS)


@triton.jit  # type: ignore[untyped-decorator]
def let_next_come(OVERLAPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first half of `begin`. Between the two a kernel may read what no kernel writes: weights."""
    if OVERLAPS:
        gdc_launch_dependents()


@triton.jit  # type: ignore[untyped-decorator]
def wait_for_all_before(OVERLAPS: tl.constexpr):  # type: ignore[no-untyped-def]
    if OVERLAPS:
        gdc_wait()
