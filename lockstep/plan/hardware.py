"""What a run may use: the GPUs and the host memory of each of its machines."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lockstep.errors import OptionError

GIB = 2**30
_UNITS = {"G": GIB, "T": 2**40}

_GPU_SHARE = 0.99
"""Of the memory that a GPU is sold with, what a program sees: 139.8 of an H200's 141 GiB."""

_FORM = re.compile(r"(?:(?P<count>\d+)x(?P<name>[\w.]+)-(?P<gpu>\d+(?:\.\d+)?[GT]),)?(?P<host>\d+(?:\.\d+)?[GT])-host")


@dataclass(frozen=True)
class Hardware:
    """One machine. Without GPUs the model is in host memory."""

    num_gpus: int
    gpu_name: str
    gpu_bytes: int
    """That a program can use, of each GPU."""
    host_bytes: int

    @classmethod
    def parse(cls, text: str) -> Hardware:
        """Read `8xH100-80G,2T-host`: eight GPUs of 80 GiB and 2 TiB of host memory; `16G-host` has no GPU.

        Raises:
            OptionError: it is written in another way.
        """
        found = _FORM.fullmatch(text)
        if found is None or found["count"] == "0":
            raise OptionError(
                "--hardware",
                text,
                "it does not name GPUs, their memory and the machine's.",
                "Write it like 1xH200-141G,128G-host, 8xH100-80G,2T-host, or 16G-host for a machine without GPUs.",
            )
        gpu_bytes = int(_bytes(found["gpu"]) * _GPU_SHARE) if found["gpu"] else 0
        return cls(int(found["count"] or 0), found["name"] or "", gpu_bytes, _bytes(found["host"]))

    @classmethod
    def of_this_machine(cls, *, with_gpus: bool) -> Hardware:
        """What is here: the GPUs that torch sees, and what the system or a control group leaves of host memory."""
        import torch

        from lockstep.trainer.optimizer.host_memory import host_memory_left

        if not with_gpus or not torch.cuda.is_available():
            return cls(0, "", 0, host_memory_left())
        gpu = torch.cuda.get_device_properties(0)
        return cls(torch.cuda.device_count(), gpu.name, gpu.total_memory, host_memory_left())

    def __str__(self) -> str:
        host = f"{self.host_bytes / GIB:.1f} GiB of host memory"
        if not self.num_gpus:
            return f"no GPU, {host}"
        return f"{self.num_gpus} x {self.gpu_name} with {self.gpu_bytes / GIB:.1f} GiB, {host}"


def _bytes(text: str) -> int:
    return int(float(text[:-1]) * _UNITS[text[-1]])
