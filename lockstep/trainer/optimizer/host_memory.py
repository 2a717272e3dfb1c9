"""Pinned host memory: what may be taken, and taking it.

torch's own pinned allocator rounds every block up to a power of two, up to twice of what is needed. Here every tensor
is a mapping of its own size, registered with CUDA.
"""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import Tensor

from lockstep.errors import OptionError

RESERVE = 2 * 2**30
"""Bytes that are left for the rest of the process."""


class PinnedMemory:
    """Zeroed host tensors of these shapes and types that `device` can copy from and to by itself.

    They are registered by several threads, because the system clears the pages while it pins them.
    """

    def __init__(self, layout: Iterable[tuple[Sequence[int], torch.dtype]], device: torch.device) -> None:
        self.tensors = [_mapped(shape, dtype) for shape, dtype in layout]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(partial(_register, device), self.tensors))
        weakref.finalize(self, _unregister, self.tensors).atexit = False


def _mapped(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:size].view(dtype).view(*shape)


def _register(device: torch.device, tensor: Tensor) -> None:
    storage = tensor.untyped_storage()
    with torch.cuda.device(device):  # a new thread would use the first
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(storage.data_ptr(), storage.nbytes(), 0)))


def _unregister(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        torch.cuda.cudart().cudaHostUnregister(tensor.untyped_storage().data_ptr())


def require_host_memory(needed: int, *, left: int | None = None, num_ranks: int = 1) -> None:
    """Stop before the allocation when the machine, or the container's limit, does not leave `needed` bytes.

    Args:
        left: what is left; by default what this process finds.
        num_ranks: how many processes need them together.
    Raises:
        OptionError: it does not.
    """
    left = host_memory_left() if left is None else left
    if needed + RESERVE > left:
        of_ranks = f" for the {num_ranks} ranks of a machine" if num_ranks > 1 else ""
        raise OptionError(
            "--optimizer-cpu-offload",
            f"{needed / 2**30:.1f} GiB of pinned host memory{of_ranks}",
            f"{left / 2**30:.1f} GiB are left under the memory limit, and {RESERVE / 2**30:.0f} GiB stay free for the "
            "rest of the run.",
            "Keep more of the state on the GPU with a lower --optimizer-offload-fraction, or make it smaller with "
            "--use-precision-aware-optimizer --exp-avg-dtype 8bit --exp-avg-sq-dtype 8bit.",
        )


def host_memory_left(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that this process can still take: what the machine has free, or less where a control group limits it.

    Args:
        root: where control groups are mounted, version 1 or 2.
        own: the file that names this process's groups.
    """
    return min([psutil.virtual_memory().available, *_left_in_groups(root, own)])


def _left_in_groups(root: Path, own: Path) -> Iterator[int]:
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, limit_file, used_file, cache_key = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit_file, used_file = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache_key = "total_inactive_file"
        else:
            continue
        group = mount / path.strip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(mount))):
            limit = _read(folder / limit_file)
            if limit.isdigit():
                used = int(_read(folder / used_file)) - _reclaimable(_read(folder / "memory.stat"), cache_key)
                yield int(limit) - used


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _reclaimable(stat: str, key: str) -> int:
    """Bytes of the group's use that are file cache, which the system gives up first."""
    values = dict(line.split() for line in stat.splitlines())
    return int(values.get(key, 0))
