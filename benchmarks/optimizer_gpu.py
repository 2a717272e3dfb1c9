"""Speed of the optimizer on one GPU: its kernel on the GPU's memory, and with state streamed from pinned host memory.

    python benchmarks/optimizer_gpu.py OUTPUT.json

The weights are those of two layers of Qwen3-30B-A3B in bf16, with bf16 gradients. Every rate stands beside a ceiling
that the same run measured: a copy within the GPU, copies over the link both ways at once, and torch's fused AdamW on
the CPU with fp32 weights, gradients and moments of the same shapes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from lockstep.config import OptimizerOptions
from lockstep.kernels.adamw import AdamWStep, MomentDtype, adamw, adamw_reference, state_layout
from lockstep.trainer.optimizer import Optimizer
from lockstep.trainer.optimizer.host_memory import host_memory_left

LAYER = {
    "q": (4096, 2048), "k": (512, 2048), "v": (512, 2048), "o": (2048, 4096), "router": (128, 2048), "norm": (2048,),
    "gate_up": (128, 1536, 2048), "down": (128, 2048, 768),
}  # fmt: skip
NUM_LAYERS = 2
FORMATS: list[MomentDtype] = ["fp32", "bf16", "8bit"]


def main() -> None:
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "host": {
            "cores": torch.get_num_threads(),
            "total_gib": psutil.virtual_memory().total / 2**30,
            "left_gib": host_memory_left() / 2**30,
        },
        "ceilings": ceilings(),
    }
    result["kernel"] = {moments: kernel(moments) for moments in FORMATS}
    result["streamed"] = {
        f"{moments}{', no overlap' if not overlap else ''}": streamed(moments, overlap=overlap)
        for moments, overlap in (("8bit", True), ("8bit", False), ("bf16", True))
    }
    result["cpu_adamw"] = cpu_adamw()
    Path(sys.argv[1]).write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


def ceilings() -> dict[str, float]:
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    size = 2**30
    hosts = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]

    def both_ways() -> None:
        for _ in range(4):
            with torch.cuda.stream(streams[0]):
                target[:size].copy_(hosts[0], non_blocking=True)
            with torch.cuda.stream(streams[1]):
                hosts[1].copy_(source[:size], non_blocking=True)

    return {
        "copy_tb_per_s": 2 * 2**32 / seconds(lambda: target.copy_(source)) / 1e12,
        "to_gpu_gb_per_s": size / seconds(lambda: target[:size].copy_(hosts[0], non_blocking=True)) / 1e9,
        "to_host_gb_per_s": size / seconds(lambda: hosts[1].copy_(source[:size], non_blocking=True)) / 1e9,
        "both_ways_gb_per_s_each": 4 * size / seconds(both_ways) / 1e9,
    }


def kernel(moments: MomentDtype) -> dict[str, float]:
    """On the largest weight, all of it in the GPU's memory; the bytes are those that one pass must move."""
    shape = (128 * 1536, 2048)
    weight, grad = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    layout = list(state_layout(torch.Size(shape), weight.dtype, moments, moments))
    state = {name: torch.zeros(s, dtype=d, device="cuda") for name, s, d in layout}
    step = AdamWStep(1e-6, 0.9, 0.98, 1e-8, 0.1, 3, 0.5, seed=1)
    moved = grad.nbytes + 2 * (weight.nbytes + sum(tensor.nbytes for tensor in state.values()))
    time_s = seconds(lambda: adamw(weight, grad, state, step))
    return {
        "bytes_per_number": moved / weight.numel(),
        "tb_per_s": moved / time_s / 1e12,
        "g_numbers_per_s": weight.numel() / time_s / 1e9,
        "torch_g_numbers_per_s": weight.numel()
        / seconds(lambda: adamw_reference(weight, grad, state, step), repeats=1, warm_up=1)
        / 1e9,
    }


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for layer in range(NUM_LAYERS):
            for name, shape in LAYER.items():
                weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
                self.register_parameter(f"{name}_{layer}", nn.Parameter(weight))

    def backward(self) -> None:
        for parameter in self.parameters():
            parameter.backward(torch.randn_like(parameter))


def streamed(moments: MomentDtype, *, overlap: bool) -> dict[str, float]:
    """Whole steps: norm, decision, update. Gradients are made between the timed parts."""
    model = Layers()
    numbers = sum(parameter.numel() for parameter in model.parameters())
    started = time.perf_counter()
    optimizer = Optimizer(
        model,
        OptimizerOptions(
            use_precision_aware_optimizer=True,
            main_grads_dtype="bf16",
            exp_avg_dtype=moments,
            exp_avg_sq_dtype=moments,
            optimizer_cpu_offload=True,
            overlap_cpu_optimizer_d2h_h2d=overlap,
        ),
    )
    pinning_s = time.perf_counter() - started
    host_bytes = sum(t.nbytes for name, t in optimizer.named_state() if t.device.type == "cpu" and name != "step")
    step_s = seconds(lambda: optimizer.step(1e-6), before=model.backward, repeats=7)
    norm_s = seconds(
        optimizer.gradients.norm, before=lambda: (optimizer.gradients.clear(), model.backward()), repeats=3
    )
    return {
        "g_numbers_per_s": numbers / step_s / 1e9,
        "gb_per_s_each_way": host_bytes / step_s / 1e9,
        "norm_share": norm_s / step_s,
        "pinning_gib_per_s": host_bytes / pinning_s / 2**30,
    }


def cpu_adamw() -> dict[str, float]:
    parameters = []
    for _ in range(NUM_LAYERS):
        for shape in LAYER.values():
            parameter = nn.Parameter(torch.empty(shape).fill_(0.5))
            parameter.grad = torch.empty(shape).fill_(0.25)
            parameters.append(parameter)
    numbers = sum(parameter.numel() for parameter in parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    return {"g_numbers_per_s": numbers / seconds(optimizer.step, repeats=5) / 1e9}


def seconds(
    run: Callable[[], Any], *, before: Callable[[], Any] = lambda: None, repeats: int = 10, warm_up: int = 2
) -> float:
    """Median of some timed runs after some to warm up."""
    times = []
    for i in range(warm_up + repeats):
        before()
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if i >= warm_up:
            times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def table(result: dict[str, Any]) -> str:
    ceiling, cpu = result["ceilings"], result["cpu_adamw"]["g_numbers_per_s"]
    lines = ["| what | rate | of the ceiling |", "|---|---|---|"]
    for moments, row in result["kernel"].items():
        share = row["tb_per_s"] / ceiling["copy_tb_per_s"]
        lines.append(
            f"| kernel, {moments} moments on the GPU | {row['tb_per_s']:.2f} TB/s, {row['g_numbers_per_s']:.0f} G/s "
            f"(torch {row['torch_g_numbers_per_s']:.1f}) | {share:.0%} of the copy |"
        )
    for name, row in result["streamed"].items():
        rate = row["gb_per_s_each_way"]
        lines.append(
            f"| streamed, {name} | {row['g_numbers_per_s']:.2f} G/s, {rate:.1f} GB/s each way, norm "
            f"{row['norm_share']:.0%} | {rate / ceiling['both_ways_gb_per_s_each']:.0%} of the link, "
            f"{row['g_numbers_per_s'] / cpu:.2f} x CPU, pinning {row['pinning_gib_per_s']:.1f} GiB/s |"
        )
    lines.append(f"| torch's fused AdamW on the CPU, fp32 | {cpu:.2f} G/s | |")
    lines.append(f"\n{json.dumps(ceiling)}\n{json.dumps(result['host'])}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
