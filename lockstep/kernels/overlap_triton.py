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


def overlapping(device: torch.device) -> dict[str, Any]:
    """Arguments for the launch of a kernel whose first statement is `begin(OVERLAPS)`."""
    return {"OVERLAPS": True, "launch_pdl": True} if _can_overlap(device) else {"OVERLAPS": False}


@triton.jit  # type: ignore[untyped-decorator]
def begin(OVERLAPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Let the next kernel come, and wait for all before. Every program of a kernel must call it before anything else:
    then the end of a kernel means the end of all kernels before it."""
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
