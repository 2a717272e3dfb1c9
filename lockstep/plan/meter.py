"""Measured peaks of memory beside the predicted ones, phase by phase."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import psutil
import torch

from lockstep.kernels.address_range import HELD
from lockstep.plan.hardware import GIB
from lockstep.plan.predict import Prediction

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PARTS = {"load": ("load",), "rollout": ("rollout",), "log_probs": ("log-probs",), "train": ("backward", "optimizer")}
_PARTS |= {"save": ("save",)}
"""What a run measures as one -> the phases of a plan that it covers."""


_METRICS = {
    "gpu": ("perf/memory_gpu", "perf/memory_gpu_predicted"),
    "host": ("perf/memory_host", "perf/memory_host_predicted"),
}
"""Kind of memory -> names of the measured and of the predicted peak, before the phase's."""


class MemoryMeter(Protocol):
    """Peaks between `start` and `stop`. Phases follow each other."""

    def start(self) -> None: ...

    def stop(self, phase: str) -> None:
        """End of "load", "rollout", "log_probs", "train" or "save"."""
        ...

    def take(self) -> dict[str, float]:
        """Metrics of the phases since the last call, in GiB."""
        ...

    def summary(self) -> Iterator[str]:
        """Lines with the highest peak of every phase beside its prediction."""
        ...


class NoMeter:
    """Measures nothing."""

    def start(self) -> None:
        pass

    def stop(self, phase: str) -> None:
        pass

    def take(self) -> dict[str, float]:
        return {}

    def summary(self) -> Iterator[str]:
        return iter(())


class ProcessMeter:
    """Peaks of this process, of its children's memory at the end of a phase, and of its GPU.

    GPU peaks are those of tensors, of the sampler's caches and of weights gathered for it, without CUDA itself and what
    the allocator holds in reserve.
    """

    def __init__(self, prediction: Prediction, device: torch.device) -> None:
        self._device = device
        self._predicted: dict[tuple[str, str], float] = {}
        for part, names in _PARTS.items():
            for phase in (phase for phase in prediction.phases if phase.name in names):
                for kind, size in (("gpu", phase.tensor_bytes), ("host", phase.host_bytes)):
                    self._predicted[part, kind] = max(self._predicted.get((part, kind), 0.0), size / GIB)
        self._measured: dict[tuple[str, str], float] = {}
        self._highest: dict[tuple[str, str], float] = {}

    def start(self) -> None:
        _forget_host_peak()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            HELD.forget_peak()

    def stop(self, phase: str) -> None:
        peaks = {"host": _host_peak()}
        if self._device.type == "cuda":
            peaks["gpu"] = torch.cuda.max_memory_allocated(self._device) + HELD.peak
        for kind, size in peaks.items():
            for kept in (self._measured, self._highest):
                kept[phase, kind] = max(kept.get((phase, kind), 0.0), size / GIB)

    def take(self) -> dict[str, float]:
        measured, self._measured = self._measured, {}
        predicted = {place: size for place, size in self._predicted.items() if place in measured}
        return {
            f"{_METRICS[kind][number]}/{phase}": size
            for number, sizes in enumerate((measured, predicted))
            for (phase, kind), size in sizes.items()
        }

    def summary(self) -> Iterator[str]:
        kinds = [kind for kind in ("gpu", "host") if any(kind == k for _, k in self._highest)]
        for kind in kinds:
            parts = [
                f"{phase} {size:.3g}" + (f" ({predicted:.3g})" if (predicted := self._predicted.get(place)) else "")
                for phase in _PARTS
                if (size := self._highest.get(place := (phase, kind))) is not None
            ]
            label = "GPU" if kind == "gpu" else "host"
            yield f"{label} memory, highest GiB (predicted): {', '.join(parts)}"


def _forget_host_peak() -> None:
    """Let the system measure this process's peak anew, where it can."""
    try:
        _RESET.write_text("5")
    except OSError:
        return


def _host_peak() -> int:
    """Since it was forgotten, or of the process's life where the system does not forget; children's use is added."""
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    peak = next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), peak)
    return peak + sum(_resident(child) for child in psutil.Process().children(recursive=True))


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0
