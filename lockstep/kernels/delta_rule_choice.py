"""Which kernels compute the delta rule on a GPU in 16 bits: the fastest that are known to be right there."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from re import match
from typing import Literal

Kernels = Literal["triton", "fla", "torch"]
"""Our own Triton kernels, those of flash-linear-attention (the package fla-core), the plain version."""

RIGHT_TO = 0.02
"""Largest relative error in bf16 that counts as right: rounding alone makes 0.004."""


def choose_kernels(triton_error: float | None, fla_fault: str | None) -> Kernels:
    """From the measured error of ours (None: they cannot run), and from what is wrong with fla's (None: nothing)."""
    if triton_error is not None and triton_error < RIGHT_TO:
        return "triton"
    return "fla" if fla_fault is None else "torch"


def fla_fault(fla: str | None, triton: str | None, capability: tuple[int, int], key_dim: int = 128) -> str | None:
    """Why fla's delta rule must not be used; None when its forward and backward are right.

    Args:
        fla, triton: installed versions, None where the package is missing.
        capability: the GPU's compute capability.
    Sources: fla-core 0.6.0 refuses its gated backward on Hopper with Triton 3.4.0 to 3.7.0, which miscompile it. It
        carries the cures for Triton's faults on Blackwell, and asks for Triton 3.3.
    """
    if fla is None:
        return "fla-core is not installed"
    if release(fla) < (0, 6):
        return f"fla-core {fla} is older than 0.6 and known to be wrong on some GPUs"
    if triton is None:
        return "Triton is not installed"
    if release(triton) < (3, 3):
        return f"Triton {triton} is older than 3.3, the oldest that fla-core supports"
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    if key_dim > 256:
        return f"fla's kernels take key heads of at most 256, not {key_dim}"
    if capability[0] == 9 and (3, 4) <= release(triton) < (3, 7, 1):
        return f"Triton {triton} miscompiles its backward on Hopper GPUs; Triton 3.7.1 does not"
    return None


def release(text: str) -> tuple[int, ...]:
    """The numbers at the start: (3, 7, 1) of "3.7.1+git12"."""
    found = match(r"\d+(\.\d+)*", text)
    assert found, f"a version starts with a number, and {text!r} does not"
    return tuple(int(number) for number in found[0].split("."))


@cache
def installed(package: str) -> str | None:
    """The package's version, None when it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
