"""The gated delta rule and its convolution on a GPU, at Qwen3-Next's shapes: times and their share of the floor.

    python benchmarks/delta_rule_gpu.py OUTPUT.json

One layer, 16,384 tokens in documents of 4,096, 16 key heads and 32 value heads of 128, bf16. The floor is the larger of
two times: fewest bytes (inputs read and outputs written once) over the copy bandwidth measured here, and fewest
operations over the matrix rate measured here. Nobody reaches it; it says how far away a kernel is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockstep.kernels.causal_conv import causal_conv, causal_conv_step
from lockstep.kernels.delta_rule_choice import installed
from lockstep.kernels.gated_delta_rule import (
    CHUNK,
    DeltaLayout,
    _by_fla,
    _Chunks,
    _GatedDeltaRule,
    gated_delta_rule,
    gated_delta_step,
    gated_delta_step_reference,
    kernels_on,
)

KEYS, VALUES, DIM, DOCUMENT, TOKENS = 16, 32, 128, 4096, 16384
CHANNELS, TAPS = (2 * KEYS + VALUES) * DIM, 4
DECODING = 128
"""Sequences of one decode step."""


def main() -> None:
    torch.manual_seed(0)
    copy, matmul = ceilings()
    floors = floor_seconds(copy, matmul)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "kernels": kernels_on(0, KEYS, DIM, VALUES, DIM),
        "copy_TB_s": round(copy / 1e12, 2),
        "matmul_TFLOP_s": round(matmul / 1e12),
    }
    for name, floor, work in cases():
        seconds = measure(work)
        result[name] = {"ms": round(seconds * 1e3, 3), "of_the_floor": round(floors[floor] / seconds, 3)}
        print(f"{name:44} {seconds * 1e3:8.3f} ms  floor {floors[floor] * 1e3:6.3f} ms", flush=True)
    Path(sys.argv[1]).write_text(json.dumps(result, indent=2) + "\n")


def measure(work: Callable[[], object], repeats: int = 20) -> float:
    """Median seconds of one call, by events, after five calls to warm up."""
    for _ in range(5):
        work()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[repeats // 2]


def ceilings() -> tuple[float, float]:
    """Bytes/s of a large copy (read and written), operations/s of a large bf16 product."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / measure(lambda: target.copy_(source))
    left, right = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return copy, 2 * 8192**3 / measure(lambda: left @ right)


def floor_seconds(copy: float, matmul: float) -> dict[str, float]:
    """Matrix products of a chunk of one head: overlaps, the solution, three with the state, one with the values."""
    io = TOKENS * CHANNELS * 2 + TOKENS * VALUES * (DIM * 2 + 8)
    chunks = TOKENS // CHUNK * VALUES
    operations = 2 * chunks * (3 * CHUNK * CHUNK * DIM + CHUNK * CHUNK * DIM + 3 * CHUNK * DIM * DIM)
    return {
        "rule": max(io / copy, operations / matmul),
        "rule and gradients": max(3 * io / copy, 3 * operations / matmul),
        "conv": 2 * TOKENS * CHANNELS * 2 / copy,
        "conv and gradients": 5 * TOKENS * CHANNELS * 2 / copy,
        "step": 2 * DECODING * VALUES * DIM * DIM * 4 / copy,
        "conv step": 2 * DECODING * CHANNELS * TAPS * 2 / copy,
    }


def cases() -> list[tuple[str, str, Callable[[], object]]]:
    """(name, floor, what to time)"""
    layout = DeltaLayout([DOCUMENT] * (TOKENS // DOCUMENT), torch.device("cuda"))
    q, k = (normal(TOKENS, KEYS, DIM).requires_grad_() for _ in range(2))
    v = normal(TOKENS, VALUES, DIM).requires_grad_()
    log_decay = (-torch.rand(TOKENS, VALUES, device="cuda")).requires_grad_()
    beta = torch.rand(TOKENS, VALUES, device="cuda").requires_grad_()
    state = torch.zeros(len(layout.lengths), VALUES, DIM, DIM, device="cuda")
    inputs, upstream = (q, k, v, log_decay, beta), normal(TOKENS, VALUES, DIM)
    x, weight = normal(TOKENS, CHANNELS).requires_grad_(), normal(CHANNELS, TAPS).requires_grad_()
    rows = (normal(DECODING, KEYS, DIM), normal(DECODING, KEYS, DIM), normal(DECODING, VALUES, DIM))
    gates = (-torch.rand(DECODING, VALUES, device="cuda"), torch.rand(DECODING, VALUES, device="cuda"))
    pool = torch.randn(DECODING, VALUES, DIM, DIM, device="cuda")
    conv_pool, slots = normal(DECODING, CHANNELS, TAPS - 1), torch.randperm(DECODING, device="cuda")

    def rule() -> Tensor:
        return gated_delta_rule(*inputs, layout)[0]

    def plain_rule() -> Tensor:
        out: Tensor = _GatedDeltaRule.apply(_Chunks, layout, *inputs, state)[0]
        return out

    def fla_rule() -> Tensor:
        return _by_fla(layout, *inputs, state)[0]

    def conv_step() -> Tensor:
        return causal_conv_step(x[:DECODING], weight, conv_pool, slots)

    def without_gradients(work: Callable[[], Tensor]) -> Callable[[], object]:
        return torch.no_grad()(work)

    return [
        ("rule: forward", "rule", without_gradients(rule)),
        ("rule: forward + backward", "rule and gradients", lambda: rule().backward(upstream)),
        ("rule, torch: forward", "rule", without_gradients(plain_rule)),
        ("rule, torch: forward + backward", "rule and gradients", lambda: plain_rule().backward(upstream)),
        ("convolution: forward", "conv", without_gradients(lambda: causal_conv(x, weight, layout)[0])),
        (
            "convolution: forward + backward",
            "conv and gradients",
            lambda: causal_conv(x, weight, layout)[0].backward(x),
        ),
        ("step of 128 sequences", "step", lambda: gated_delta_step(*rows, *gates, pool, slots)),
        ("step of 128 sequences, torch", "step", lambda: gated_delta_step_reference(*rows, *gates, pool, slots)),
        *([("rule, fla: forward", "rule", without_gradients(fla_rule))] if installed("fla-core") else []),
        ("convolution step of 128 sequences", "conv step", without_gradients(conv_step)),
    ]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


if __name__ == "__main__":
    main()
