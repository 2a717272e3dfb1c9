"""Full-parameter training steps of Qwen3-30B-A3B, at full size and depth with random weights, on one GPU.

    python benchmarks/one_gpu_30b.py OUTPUT.json [--layers 48] [--steps 3] [--overlapped-steps 4]

A step is 131,072 tokens in documents of 4,096: forward and backward by layer over micro-batches of 16,384 tokens,
exact clipping, and an AdamW update whose state streams through the GPU from pinned host memory. Prints seconds of each
part, model TFLOP/s (recomputing not counted), and the peaks of GPU and host memory; checks that every tensor's master
changed.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lockstep.algorithms import make_policy_loss
from lockstep.config import BatchingOptions, OptimizerOptions
from lockstep.models import LanguageModel, build_model, read_model_config
from lockstep.trainer.batch import TrainSample
from lockstep.trainer.local import LocalTrainer

DOCUMENT, MICRO_BATCH, STEP = 4096, 16384, 131072
SHAPE: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True, "rope_theta": 1e6,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--steps", type=int, default=3, help="each waits for its update")
    parser.add_argument("--overlapped-steps", type=int, default=4, help="updates hide behind the next forward")
    parser.add_argument("--offload-fraction", type=float, default=0.9)
    options = parser.parse_args()
    started = time.perf_counter()
    model = random_model(options.layers)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion parameters", flush=True)
    trainer = make_trainer(model, options.offload_fraction)
    torch.cuda.synchronize()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "setup_s": time.perf_counter() - started,
        "after_setup_gib": torch.cuda.memory_allocated() / 2**30,
        "host_after_setup_gib": host_peak_gib(),
        "steps": [],
    }
    print(json.dumps(result), flush=True)
    forward = ForwardTimer(trainer)
    before = fingerprints(trainer)
    for number in range(options.steps):
        forward.begin()
        measured = timed_step(trainer, number)
        result["steps"].append(measured)
        print(json.dumps(measured), flush=True)
        if number == 0:
            after = fingerprints(trainer)
            result["unchanged_masters"] = [name for name in before if before[name] == after[name]]
            print("masters that did not change:", result["unchanged_masters"], flush=True)
    result["overlapped"] = overlapped_steps(trainer, options.overlapped_steps, forward)
    result["forward_s"] = forward.seconds()
    print(json.dumps(result["overlapped"]), "forward", result["forward_s"], flush=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


def random_model(layers: int) -> LanguageModel:
    with torch.device("meta"):
        model = build_model(read_model_config(SHAPE | {"num_hidden_layers": layers}))
    model = model.to(torch.bfloat16).to_empty(device="cuda")
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    return model


def make_trainer(model: LanguageModel, offload_fraction: float) -> LocalTrainer:
    return LocalTrainer(
        model,
        reference=None,
        loss=make_policy_loss(),
        optimizer=OptimizerOptions(
            lr=1e-6,
            lr_decay_style="constant",
            use_precision_aware_optimizer=True,
            main_grads_dtype="bf16",
            exp_avg_dtype="8bit",
            exp_avg_sq_dtype="8bit",
            optimizer_cpu_offload=True,
            optimizer_offload_fraction=offload_fraction,
            overlap_cpu_optimizer_d2h_h2d=True,
        ),
        batching=BatchingOptions(use_dynamic_batch_size=True, max_tokens_per_gpu=MICRO_BATCH, backward_order="layer"),
        temperature=1.0,
        needs_entropy=False,
        routing="own",
        num_steps=100,
    )


def samples(seed: int) -> list[TrainSample]:
    draw = torch.Generator().manual_seed(seed)
    response = DOCUMENT - 256
    return [
        TrainSample(
            tokens=torch.randint(0, SHAPE["vocab_size"], (DOCUMENT,), generator=draw).tolist(),
            response_length=response,
            loss_mask=[1] * response,
            loss_weight=1.0 / (response * STEP // DOCUMENT),
            advantage=float(torch.randn((), generator=draw)),
        )
        for _ in range(STEP // DOCUMENT)
    ]


def overlapped_steps(trainer: LocalTrainer, count: int, forward: ForwardTimer) -> dict[str, Any]:
    """Steps as a run makes them. A step returns when its gradient norm is known, so from the second on each takes its
    own passes and what the update before it added to them."""
    batches = [samples(100 + number) for number in range(count)]
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    marks, norms = [time.perf_counter()], []
    for batch in batches:
        forward.begin()
        norms.append(trainer.step(batch).metrics["train/grad_norm"])
        marks.append(time.perf_counter())
    trainer.optimizer.synchronize()
    torch.cuda.synchronize()
    last_update_s = time.perf_counter() - marks[-1]
    steps_s = [end - start for start, end in pairwise(marks)]
    step_s = median(steps_s[1:])
    return {
        "steps_s": steps_s,
        "last_update_s": last_update_s,
        "step_s": step_s,
        "tokens_per_s": STEP / step_s,
        "model_tflops_update_included": flops_per_token(trainer.model) * STEP / step_s / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "host_peak_gib": host_peak_gib(),
        "grad_norms": norms,
    }


class ForwardTimer:
    """The GPU's time of every step from its beginning until the last layer of the last micro-batch's forward."""

    def __init__(self, trainer: LocalTrainer) -> None:
        self._events: list[list[torch.cuda.Event]] = []
        trainer.model.model.norm.register_forward_pre_hook(self._mark, prepend=True)

    def begin(self) -> None:
        self._events.append([])
        self._record()

    def _mark(self, *_: Any) -> None:
        if self._events and len(self._events[-1]) == 1:
            self._record()

    def _record(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events[-1].append(event)

    def seconds(self) -> list[float]:
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in self._events]


def timed_step(trainer: LocalTrainer, number: int) -> dict[str, Any]:
    """One step; the update's share is what passes between the end of backward and the end of the update."""
    batch = samples(number)
    start_update = trainer.optimizer.start_step
    marks: dict[str, float] = {}

    def marked(lr: float) -> float:
        torch.cuda.synchronize()
        marks["backward"] = time.perf_counter()
        marks["allocated"] = torch.cuda.max_memory_allocated()
        grad_norm = start_update(lr)
        trainer.optimizer.synchronize()
        torch.cuda.synchronize()
        return grad_norm

    trainer.optimizer.start_step = marked  # type: ignore[method-assign]
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    metrics = trainer.step(batch).metrics
    end = time.perf_counter()
    trainer.optimizer.start_step = start_update  # type: ignore[method-assign]
    passes_s = marks["backward"] - start
    return {
        "passes_s": passes_s,
        "update_s": end - marks["backward"],
        "model_tflops": flops_per_token(trainer.model) * STEP / passes_s / 1e12,
        "tokens_per_s": STEP / (end - start),
        "peak_gib": marks["allocated"] / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "host_peak_gib": host_peak_gib(),
        "grad_norm": metrics["train/grad_norm"],
        "loss": metrics["train/loss"],
    }


def flops_per_token(model: LanguageModel) -> float:
    c = model.config
    attention = c.hidden_size * c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
    scores = DOCUMENT * c.num_attention_heads * c.head_dim
    experts = 3 * c.hidden_size * c.num_experts_per_tok * c.moe_intermediate_size
    layer = attention + scores + experts + c.hidden_size * c.num_experts
    return 6.0 * (c.num_hidden_layers * layer + c.vocab_size * c.hidden_size)


def fingerprints(trainer: LocalTrainer) -> dict[str, int]:
    """A sum over the bits of every tensor's master: weight bits and remainder."""
    state = dict(trainer.optimizer.named_state())
    return {
        name: bits(parameter.detach().view(torch.int16)) * 2**16 + bits(state[f"remainder.{name}"])
        for name, parameter in trainer.model.named_parameters()
    }


def bits(numbers: torch.Tensor) -> int:
    """Their sum, part by part: on a CPU torch widens all that it sums."""
    return sum(int(part.sum(dtype=torch.int64)) for part in numbers.flatten().split(2**24))


def host_peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
