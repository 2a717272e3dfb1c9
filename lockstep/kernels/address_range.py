"""Device memory at addresses that stay while its pages come and go, so that CUDA graphs survive between rollouts.

Source: the virtual memory management of the CUDA driver API, called through ctypes.
"""

from __future__ import annotations

import ctypes
import warnings
import weakref
from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

_PIECE = 2**33
"""Bytes of one physical allocation, the last of a range excepted: the driver takes its time for each."""
_ALIGNMENT = 256
"""Bytes: enough for every kernel."""
_PINNED, _DEVICE, _READ_WRITE, _MINIMUM = 1, 1, 3, 0


class _Held:
    """Bytes of all ranges of this process, and the most since `forget_peak`; torch does not count them."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def add(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.peak = max(self.peak, self.now)

    def forget_peak(self) -> None:
        self.peak = self.now


HELD = _Held()


class NoPagesLeft(Exception):
    """The GPU has not as many bytes as a range wants.

    Args:
        wanted, left: bytes.
    """

    def __init__(self, wanted: int, left: int) -> None:
        super().__init__(f"{wanted / 2**30:.1f} GiB wanted, {left / 2**30:.1f} GiB left")
        self.wanted, self.left = wanted, left


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


class AddressRange:
    """Bytes on a GPU whose pages can be given back and taken again; what was in them is lost then.

    Where the driver cannot do that, `can_release` is False and the memory is an ordinary tensor's.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._device = device
        self._pieces: list[tuple[int, int, ctypes.c_ulonglong]] = []
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self.can_release = device.type == "cuda" and num_bytes > 0 and _driver() is not None
        if not self.can_release:
            self._bytes = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
            return
        torch.zeros(1, device=device)  # the driver needs a context
        self._properties = _Properties(type=_PINNED, location=_Location(_DEVICE, torch.cuda.current_device()))
        granularity = ctypes.c_size_t()
        _call("cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(self._properties), _MINIMUM)
        self._num_bytes = -(-num_bytes // granularity.value) * granularity.value
        self._start = ctypes.c_ulonglong()
        _call("cuMemAddressReserve", ctypes.byref(self._start), ctypes.c_size_t(self._num_bytes), 0, 0, 0)
        end = weakref.finalize(self, _give_up, self._start, self._num_bytes, self._pieces)
        end.atexit = False  # the driver may be gone before
        self.hold()
        self._bytes = torch.as_tensor(_Raw(self._start.value, num_bytes), device=device)

    @property
    def is_held(self) -> bool:
        return not self.can_release or bool(self._pieces)

    @property
    def data(self) -> Tensor:
        """All bytes, uint8. To be touched while the pages are held only."""
        return self._bytes

    def hold(self) -> None:
        """Have pages, filled with zeros. What torch's allocator keeps unused is given back first.

        Raises:
            NoPagesLeft: the GPU has not as much.
        """
        if self.is_held:
            return
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(self._device)[0]
        access = _Access(self._properties.location, _READ_WRITE)
        for offset in range(0, self._num_bytes, _PIECE):
            size = min(_PIECE, self._num_bytes - offset)
            handle = ctypes.c_ulonglong()
            if _driver().cuMemCreate(ctypes.byref(handle), ctypes.c_size_t(size), ctypes.byref(self._properties), 0):
                self.release()
                raise NoPagesLeft(self._num_bytes, free)
            address = self._start.value + offset
            _call("cuMemMap", ctypes.c_ulonglong(address), ctypes.c_size_t(size), ctypes.c_size_t(0), handle, 0)
            self._pieces.append((address, size, handle))
            HELD.add(size)
        whole = ctypes.c_size_t(self._num_bytes)
        _call("cuMemSetAccess", self._start, whole, ctypes.byref(access), ctypes.c_size_t(1))
        if len(self._bytes):
            self._bytes.zero_()

    def release(self) -> None:
        """Give the pages back; the addresses stay reserved."""
        if not self.can_release:
            return
        torch.cuda.synchronize(self._device)
        _unmap(self._pieces)


def tensors_in_range(
    shapes: Sequence[tuple[Sequence[int], torch.dtype]], device: torch.device
) -> tuple[AddressRange, list[Tensor]]:
    """Tensors of these shapes and dtypes, one after the other in a range of their own, which is held."""
    sizes = [prod(shape) * dtype.itemsize for shape, dtype in shapes]
    aligned = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    memory = AddressRange(sum(aligned), device)
    parts = zip(memory.data.split(aligned), sizes, shapes, strict=True)
    return memory, [part[:size].view(dtype).view(*shape) for part, size, (shape, dtype) in parts]


class _Raw:
    """Device memory as torch takes it over without a copy."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            "strides": None,
        }


@cache
def _driver() -> Any:
    """libcuda, or None where it cannot manage virtual memory."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        has_all = all(hasattr(library, name) for name in ("cuMemAddressReserve", "cuMemCreate", "cuMemSetAccess"))
    except OSError:
        has_all = False
    if not has_all:
        warnings.warn(
            "the CUDA driver has no virtual memory: what only sampling needs stays while training", stacklevel=2
        )
    return library if has_all else None


def _unmap(pieces: list[tuple[int, int, ctypes.c_ulonglong]]) -> None:
    for address, size, handle in pieces:
        _call("cuMemUnmap", ctypes.c_ulonglong(address), ctypes.c_size_t(size))
        _call("cuMemRelease", handle)
        HELD.add(-size)
    pieces.clear()


def _give_up(start: ctypes.c_ulonglong, num_bytes: int, pieces: list[tuple[int, int, ctypes.c_ulonglong]]) -> None:
    torch.cuda.synchronize()
    _unmap(pieces)
    _call("cuMemAddressFree", start, ctypes.c_size_t(num_bytes))


def _call(name: str, *arguments: Any) -> None:
    code = getattr(_driver(), name)(*arguments)
    assert code == 0, f"{name} failed with CUDA error {code}"
