"""Speed of the kernels of a decoding step against the time that their bytes take.

    python benchmarks/decode_kernels_gpu.py OUT.json

Every time is per call inside a CUDA graph of several calls that follow each other on different data, launch gaps
included. The floor is what has to be read or written once, over the rate of a device copy in the same run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from lockstep.kernels.decode_experts import decode_experts
from lockstep.kernels.decode_linears import linears, swiglu_linear
from lockstep.kernels.decode_linears_triton import linears_triton, swiglu_linear_triton
from lockstep.kernels.experts import grouped_experts
from lockstep.kernels.norm_rotary import norm_and_rotate
from lockstep.kernels.paged_attention import norm_rotate_store, paged_decode, store_kv
from lockstep.kernels.rms_norm import residual_rms_norm
from lockstep.kernels.sample import sample_tokens, sample_tokens_reference
from lockstep.kernels.swiglu import swiglu

GPU = torch.device("cuda")
VOCABULARY = 151_936
CACHE_BYTES = 5 * 10**9
"""Of each attention's cache."""
ATTENTION = {"30B-A3B": (32, 4, 128), "4B": (32, 8, 128), "Next": (16, 2, 256)}
"""Query heads, key/value heads, head dim."""
EXPERTS = {"30B-A3B": (128, 8, 2048, 768), "Next": (512, 10, 2048, 512)}
"""Experts, slots per token, model width, expert width."""
LINEARS = {
    "30B-A3B q, k, v": (2048, (4096, 512, 512)),
    "4B q, k, v": (2560, (4096, 1024, 1024)),
    "30B-A3B o": (4096, (2048,)),
    "4B o": (4096, (2560,)),
    "4B down": (9728, (2560,)),
    "router": (2048, (128,)),
    "30B-A3B vocabulary": (2048, (VOCABULARY,)),
}
"""Inputs, outputs of each weight."""
Calls = list[Callable[[], Any]]


def microseconds(calls: Calls) -> float:
    """Per call: median over five replays of a graph that holds them all."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    for repeat in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(3):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        if repeat:
            times.append(start.elapsed_time(end) * 1e3 / 3 / len(calls))
    return sorted(times)[len(times) // 2]


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=GPU).normal_(0, scale)


def copy_rate() -> float:
    """Bytes read and written per second by a device copy, after a warm-up."""
    source = torch.empty(2 * 10**9, dtype=torch.int8, device=GPU)
    target = torch.empty_like(source)
    for _ in range(20):
        target.copy_(source)
    return 4e9 / microseconds([lambda: target.copy_(source)] * 5) * 1e6


def context_lengths(load: str, batch: int) -> Tensor:
    """2,048 each, or log-normal with a long tail: median 665, at most 8,192."""
    if load == "2k":
        return torch.full((batch,), 2048)
    normal = torch.randn(batch, generator=torch.Generator().manual_seed(0))
    return torch.exp(normal + 6.5).clamp(64, 8192).long()


def attention_calls(model: str, batch: int, load: str, block_size: int) -> tuple[Calls, int]:
    heads, keys, head_dim = ATTENTION[model]
    token_bytes = 2 * 2 * keys * head_dim
    num_blocks = CACHE_BYTES // (token_bytes * block_size)
    cache = torch.empty(2, keys, num_blocks, block_size, head_dim, dtype=torch.bfloat16, device=GPU).uniform_(-1, 1)
    lengths = context_lengths(load, batch)
    blocks = -(-lengths // block_size)
    q, lengths_B = draw(batch, heads, head_dim), lengths.int().to(GPU)
    calls: Calls = []
    # So many batches that no part of the cache is still near when its turn comes again.
    for seed in range(max(4, min(24, -(-2 * 10**8 // (int(lengths.sum()) * token_bytes))))):
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).int()
        assert int(blocks.sum()) <= num_blocks
        tables = torch.zeros(batch, int(blocks.max()), dtype=torch.int32)
        for row, own in zip(tables, order[: int(blocks.sum())].split(blocks.tolist()), strict=True):
            row[: len(own)] = own
        tables = tables.to(GPU)
        calls.append(partial(paged_decode, q, cache, tables, lengths_B))
    return calls, int(lengths.sum()) * token_bytes


def expert_calls(model: str, tokens: int, compute: Callable[..., Tensor]) -> tuple[Calls, int]:
    """With the bytes of the experts that are chosen, in the mean of the calls."""
    experts, slots, width, inner = EXPERTS[model]
    gate_up, down = draw(experts, 2 * inner, width, scale=0.02), draw(experts, width, inner, scale=0.02)
    calls: Calls = []
    touched = 0
    count = 16 if tokens < 16 else 4
    for seed in range(count):
        scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))
        chosen = scores.topk(slots).indices.to(GPU)
        x, weights = draw(tokens, width), draw(tokens, slots)
        touched += len(chosen.unique())
        calls.append(partial(compute, x, chosen, weights, gate_up, down))
    return calls, touched * 3 * width * inner * 2 // count


def linear_weights(name: str) -> list[list[Tensor]]:
    """Several sets, together larger than the cache that a GPU has."""
    width, sizes = LINEARS[name]
    count = max(2, min(32, 2 * 10**8 // (sum(sizes) * width * 2)))
    return [[draw(size, width, scale=0.02) for size in sizes] for _ in range(count)]


def dense_layers(batch: int, count: int = 8, context: int = 2048) -> tuple[Calls, int]:
    """Layers of a 4B, one after the other on the same rows, all of their kernels."""
    heads, keys, head_dim, width, inner = 32, 8, 128, 2560, 9728
    num_blocks = batch * context // 16
    lengths = torch.full((batch,), context, dtype=torch.int32, device=GPU)
    tables = torch.randperm(num_blocks, device=GPU).int().view(batch, -1)
    slots = tables[:, -1].long() * 16 + 15
    rotary = draw(batch, 1, head_dim), draw(batch, 1, head_dim)
    norms, head_norms = torch.ones(width, device=GPU).bfloat16(), torch.ones(head_dim, device=GPU).bfloat16()
    state = [draw(batch, width), draw(batch, width)]
    calls: Calls = []
    num_bytes = 0
    for _ in range(count):
        qkv = [draw(size * head_dim, width, scale=0.02) for size in (heads, keys, keys)]
        out, gate, up = draw(width, heads * head_dim, scale=0.02), *(draw(inner, width, scale=0.02) for _ in range(2))
        down = draw(width, inner, scale=0.02)
        cache = torch.empty(2, keys, num_blocks, 16, head_dim, dtype=torch.bfloat16, device=GPU).uniform_(-1, 1)
        num_bytes = 2 * (sum(w.numel() for w in (*qkv, out, gate, up, down)) + 2 * batch * context * keys * head_dim)

        def layer(
            qkv: Any = qkv, out: Any = out, gate: Any = gate, up: Any = up, down: Any = down, cache: Any = cache
        ) -> None:
            stream, normed = residual_rms_norm(state[0], state[1], norms, 1e-6)
            q, k, v = (x.unflatten(1, (-1, head_dim)) for x in linears(normed, qkv))
            q = norm_rotate_store(q, k, v, head_norms, head_norms, 1e-6, 0.0, rotary, cache, slots)
            (mixed,) = linears(paged_decode(q, cache, tables, lengths).flatten(1), [out])
            state[0], normed = residual_rms_norm(stream, mixed, norms, 1e-6)
            (state[1],) = linears(swiglu_linear(normed, gate, up), [down])

        calls.append(layer)
    return calls, num_bytes


class Report:
    def __init__(self) -> None:
        self.rate = copy_rate()
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, batch: int, calls: Calls, num_bytes: int) -> None:
        """Measure, print and keep one line."""
        took = microseconds(calls)
        floor = num_bytes / self.rate * 1e6
        self.rows.append({"what": what, "batch": batch, "us": took, "floor_us": floor, "bytes": num_bytes})
        share = f"{num_bytes / took / 1e6:.2f} TB/s | {100 * floor / took:.0f} %"
        print(f"| {what} | {batch} | {took:.1f} us | {floor:.1f} us | {share} |", flush=True)


def main(target: Path) -> None:
    torch.manual_seed(0)
    report = Report()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"copy: {report.rate / 1e12:.2f} TB/s\n")
    print("| | batch | time | floor | rate | of floor |\n|---|---|---|---|---|---|")
    with torch.inference_mode():
        for model in ATTENTION:
            for batch in (1, 32, 128, 256, 512):
                if batch * 2048 * 2 * 2 * ATTENTION[model][1] * ATTENTION[model][2] <= CACHE_BYTES:
                    report.add(f"attention {model}, 2k, blocks of 16", batch, *attention_calls(model, batch, "2k", 16))
            for batch in (128, 256):
                calls = attention_calls(model, batch, "long tail", 16)
                report.add(f"attention {model}, long tail, blocks of 16", batch, *calls)
            report.add(f"attention {model}, 2k, blocks of 64", 128, *attention_calls(model, 128, "2k", 64))
        for model in EXPERTS:
            for tokens in (1, 2, 4, 8, 32, 128, 256, 512):
                report.add(f"experts {model}", tokens, *expert_calls(model, tokens, decode_experts))
                if tokens in (1, 32, 256, 512):
                    report.add(f"experts {model}, grouped_mm", tokens, *expert_calls(model, tokens, grouped_experts))
        for batch in (1, 32, 128, 256, 512):
            measure_sampling(report, batch)
        for batch in (1, 256, 512):
            measure_storing(report, batch)
        measure_products(report)
        for batch in (1, 16, 128):
            report.add("layer of 4B, all kernels, 2k", batch, *dense_layers(batch))
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    target.with_suffix(".json").write_text(json.dumps(about | {"copy": report.rate, "rows": report.rows}, indent=1))


def measure_sampling(report: Report, batch: int) -> None:
    logits = [draw(batch, VOCABULARY, scale=2.0) for _ in range(max(1, min(16, 512 // batch)))]
    uniforms = torch.rand(batch, dtype=torch.float64, device=GPU)
    num_bytes = batch * VOCABULARY * 2
    for temperature in (1.0, 0.7):
        arguments = torch.full((batch,), temperature, device=GPU), uniforms
        report.add(
            f"sampling at {temperature}", batch, [partial(sample_tokens, x, *arguments) for x in logits], num_bytes
        )
    report.add(
        "sampling at 0.7, torch",
        batch,
        [partial(sample_tokens_reference, x, *arguments) for x in logits[:2]],
        num_bytes,
    )


def measure_storing(report: Report, batch: int) -> None:
    heads, keys, dim = 32, 8, 128
    q, k, v = draw(batch, heads, dim), draw(batch, keys, dim), draw(batch, keys, dim)
    tables, weight = (draw(batch, 1, dim), draw(batch, 1, dim)), draw(dim)
    cache, slots = draw(2, keys, 2048, 16, dim), torch.randperm(2048 * 16, device=GPU)[:batch]
    num_bytes = 2 * batch * dim * (2 * heads + 4 * keys)
    arguments = (weight, weight, 1e-6, 0.0, tables, cache, slots)

    def apart() -> None:
        norm_and_rotate(q, weight, 1e-6, 0.0, tables)
        store_kv(norm_and_rotate(k, weight, 1e-6, 0.0, tables), v, cache, slots)

    report.add("norm, rotation, store of 4B", batch, [lambda: norm_rotate_store(q, k, v, *arguments)] * 8, num_bytes)
    report.add("norm, rotation, store of 4B, apart", batch, [apart] * 8, num_bytes)


def measure_products(report: Report) -> None:
    for name, (width, sizes) in LINEARS.items():
        sets = linear_weights(name)
        for batch in (1, 2, 16):
            x, num_bytes = draw(batch, width), 2 * width * sum(sizes)
            report.add(name, batch, [partial(linears_triton, x, weights) for weights in sets], num_bytes)
            report.add(f"{name}, cuBLAS", batch, [partial(linears_torch, x, weights) for weights in sets], num_bytes)
    pairs = [(draw(9728, 2560, scale=0.02), draw(9728, 2560, scale=0.02)) for _ in range(4)]
    for batch in (1, 2, 16):
        x, num_bytes = draw(batch, 2560), 4 * 2560 * 9728
        report.add("4B gate, up, swiglu", batch, [partial(swiglu_linear_triton, x, *pair) for pair in pairs], num_bytes)
        report.add("4B gate, up, swiglu, cuBLAS", batch, [partial(swiglu_torch, x, *pair) for pair in pairs], num_bytes)


def linears_torch(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return [F.linear(x, weight) for weight in weights]


def swiglu_torch(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return swiglu(F.linear(x, gate), F.linear(x, up))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
