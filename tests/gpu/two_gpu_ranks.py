"""What each of the two processes of `test_two_gpus` does: every layout of one model, against one device alone.

Both processes compute what one device makes of the model, in fp32 and in bf16, each on its own device. All of it runs
on CPUs over gloo too.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lockstep.algorithms import make_policy_loss
from lockstep.config import BatchingOptions, OptimizerOptions
from lockstep.kernels.experts import grouped_experts
from lockstep.models import LanguageModel, build_model, read_model_config
from lockstep.parallel.experts import AllToAllExperts
from lockstep.parallel.mesh import Layout, Meshes
from lockstep.parallel.shard import shard_model
from lockstep.trainer.batch import TrainSample, pack_by_tokens
from lockstep.trainer.engine import StepResult
from lockstep.trainer.local import LocalTrainer
from lockstep.trainer.parallel import ParallelTrainer

SIZES: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 128, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 64, "num_experts_per_tok": 4, "moe_intermediate_size": 256, "norm_topk_prob": True
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "dense": SIZES | {"model_type": "qwen3", "num_hidden_layers": 3, "tie_word_embeddings": True},
    "moe": SIZES | EXPERTS | {"model_type": "qwen3_moe", "num_hidden_layers": 3},
    "next": SIZES | EXPERTS | {
        "model_type": "qwen3_next", "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 256,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"], "partial_rotary_factor": 0.25,
        "linear_conv_kernel_dim": 4, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "shared_expert_intermediate_size": 256,
    },
}  # fmt: skip
"""The heads of the real models, whose kernels depend on them, in few layers."""

DENSE_LAYOUTS: list[dict[str, int]] = [{}, {"tp_size": 2}, {"cp_size": 2}, {"pp_size": 2}]
SPARSE_LAYOUTS: list[dict[str, int]] = [
    {"ep_size": 2},
    {"etp_size": 2},
    {"tp_size": 2, "ep_size": 2},
    {"cp_size": 2, "ep_size": 2},
]

MAX_TOKENS = 2048
LONGEST = 900


@dataclass(frozen=True)
class Outcome:
    """Two steps of a trainer."""

    results: list[StepResult]
    movements: list[dict[str, Tensor]]
    """After each step: how far every weight's master, or this rank's part of it, is from where it began."""


def documents(vocab: int, longest: int, seed: int) -> list[TrainSample]:
    """Ragged samples that make an odd number of micro-batches, so that data-parallel ranks get an empty one."""
    draw = random.Random(seed)
    samples = []
    for number in range(14):
        prompt, response = draw.randrange(2, longest // 4), draw.randrange(longest // 20, 3 * longest // 4)
        sample = TrainSample([draw.randrange(vocab) for _ in range(prompt + response)], response, [1] * response)
        sample.loss_mask[: number % 3] = [0] * (number % 3)
        sample.loss_weight = 1 / sum(sample.loss_mask) / 14
        sample.advantage = draw.uniform(-1.5, 1.5)
        samples.append(sample)
    return samples


def run_rank(rank: int, family: str, device_type: str, root: Path) -> None:
    """Everything of one family; a report goes to a file."""
    torch.set_num_threads(2)
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(device)
    report: dict[str, Any] = {"problem": "", "runs": {}, "seconds": {}}
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{root / 'store'}", rank=rank, world_size=2)
    try:
        _Comparison(family, device, report).run()
    except Exception:
        report["problem"] = traceback.format_exc()
    (root / f"rank_{rank}.json").write_text(json.dumps(report))
    if not report["problem"]:
        dist.barrier()
    os._exit(0)  # taking process groups down aborts now and then, in their own threads


class _Comparison:
    def __init__(self, family: str, device: torch.device, report: dict[str, Any]) -> None:
        self.family, self.device, self.report = family, device, report
        on_gpu = device.type == "cuda"
        self.longest, self.max_tokens = (LONGEST, MAX_TOKENS) if on_gpu else (90, 256)
        shape = SHAPES[family] if on_gpu else SHAPES[family] | {"hidden_size": 64, "vocab_size": 256}
        self.config = read_model_config(shape)
        self.batches = [documents(shape["vocab_size"], self.longest, seed) for seed in (1, 2)]
        self.weights = dict(_random_weights(build_model(self.config), device))
        for samples in self.batches:
            bins = pack_by_tokens([len(sample.tokens) for sample in samples], self.max_tokens)
            report["num_micro_batches"] = len(bins)

    def run(self) -> None:
        self._record(self._one(torch.float32, routing="old"))
        exact = two_steps(self._one(torch.float32), self.batches)
        self.report["exact"] = {
            "loss": [r.metrics["train/loss"] for r in exact.results],
            "grad_norm": [r.metrics["train/grad_norm"] for r in exact.results],
            "moved": [_length(movement) for movement in exact.movements],
        }
        for name, max_tokens in (("one", self.max_tokens), ("one, packed otherwise", 3 * self.max_tokens // 2)):
            trainer = self._one(torch.bfloat16, max_tokens=max_tokens)
            self._report(f"bf16 {name}", two_steps(trainer, self.batches), exact, self._whole)
        for layout in self._layouts():
            meshes = Meshes(layout, self.device.type)
            for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
                started = time.monotonic()
                trainer = self._divided(dtype, meshes)
                self._report(
                    f"{short} {layout}", two_steps(trainer, self.batches), exact, _part_of(trainer), layout=layout
                )
                if short == "bf16":
                    first = self._last
                    again = two_steps(self._divided(dtype, meshes), self.batches)
                    self.report["runs"][f"{short} {layout}"]["repeats"] = _is_equal(first, again)
                self.report["seconds"][f"{short} {layout}"] = round(time.monotonic() - started, 2)
        if self.config.num_experts:
            self.report["experts"] = starved_ranks(self.device)

    def _layouts(self) -> Iterator[Layout]:
        for sizes in [*DENSE_LAYOUTS, *(SPARSE_LAYOUTS if self.config.num_experts else [])]:
            stages = {"decoder_last_pipeline_num_layers": 1} if "pp_size" in sizes else {}
            yield Layout(world_size=2, **sizes, **stages)

    def _model(self, dtype: torch.dtype) -> LanguageModel:
        with torch.device("meta"):
            model = build_model(self.config).to(dtype)
        model.to_empty(device=self.device)
        model.tie_weights()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.weights[name])
        return model

    def _options(self, max_tokens: int) -> dict[str, Any]:
        loss = make_policy_loss(
            "gspo" if self.family == "dense" else "grpo",
            use_kl_loss=True, kl_loss_coef=0.05, kl_loss_type="low_var_kl", entropy_coef=0.01,
            eps_clip=0.9, eps_clip_high=9.0,
        )  # fmt: skip
        return {
            "reference": None, "loss": loss, "temperature": 0.8, "needs_entropy": True, "num_steps": 10,
            # An epsilon far above all gradients makes the first update proportional to the gradient.
            "optimizer": OptimizerOptions(
                lr=0.1, lr_decay_style="constant", adam_eps=1.0, clip_grad=1.0, weight_decay=0.0
            ),
            "batching": BatchingOptions(use_dynamic_batch_size=True, max_tokens_per_gpu=max_tokens),
        }  # fmt: skip

    def _one(self, dtype: torch.dtype, *, max_tokens: int = 0, routing: Any = "rollout") -> LocalTrainer:
        return LocalTrainer(self._model(dtype), routing=routing, **self._options(max_tokens or self.max_tokens))

    def _divided(self, dtype: torch.dtype, meshes: Meshes) -> ParallelTrainer:
        model = self._model(dtype)
        meshes.layout.check(self.config)
        shard_model(model, meshes, reduce_dtype=torch.float32)
        # A micro-batch of context-parallel ranks has as many tokens as one of a single device.
        options = self._options(self.max_tokens // meshes.layout.cp_size)
        return ParallelTrainer(model, meshes, device=self.device, routing="rollout", **options)

    def _record(self, trainer: LocalTrainer) -> None:
        """Old log-probs a little off the policy's, and experts, for all to use the same ones. Neither a ratio that is
        clipped, nor an expert more or less, is rounding: there are none here."""
        noise = torch.Generator().manual_seed(3)
        for samples in self.batches:
            for sample, now in zip(samples, trainer.log_probs(samples), strict=True):
                moved = (0.05 * torch.randn(2, sample.response_length, generator=noise)).clamp(-0.1, 0.1)
                sample.old_log_probs, sample.ref_log_probs = now.log_probs + moved

    def _whole(self, name: str, tensor: Tensor) -> Tensor:
        return tensor

    def _report(
        self, name: str, found: Outcome, exact: Outcome, part: Callable[[str, Tensor], Tensor],
        layout: Layout | None = None,
    ) -> None:  # fmt: skip
        self._last = found
        errors = [
            {
                other: [float((movement[other] - part(other, wanted[other])).square().sum()),
                        float(part(other, wanted[other]).square().sum())]
                for other in movement
            }
            for movement, wanted in zip(found.movements, exact.movements, strict=True)
        ]  # fmt: skip
        everybodys: list[Any] = [errors]
        if layout is not None:
            everybodys = [None] * dist.get_world_size()
            dist.all_gather_object(everybodys, errors)
        self.report["runs"][name] = {
            "loss": [r.metrics["train/loss"] for r in found.results],
            "grad_norm": [r.metrics["train/grad_norm"] for r in found.results],
            "log_probs": [_rms(r, wanted) for r, wanted in zip(found.results, exact.results, strict=True)],
            "weights": [_relative(parts) for parts in zip(*everybodys, strict=True)],
        }


def two_steps(trainer: LocalTrainer | ParallelTrainer, batches: list[list[TrainSample]]) -> Outcome:
    before = {name: _master(trainer, name) for name in trainer.optimizer.parameters}
    results, movements = [], []
    for samples in copy.deepcopy(batches):
        results.append(trainer.step(samples))
        movements.append({name: _master(trainer, name) - start for name, start in before.items()})
    return Outcome(results, movements)


def _master(trainer: LocalTrainer | ParallelTrainer, name: str) -> Tensor:
    """All 32 bits of a weight, in fp64: differences of neighbours are exact there."""
    weight = trainer.optimizer.parameters[name].detach()
    if weight.dtype == torch.float32:
        return weight.double()
    remainder = dict(trainer.optimizer.named_state())[f"remainder.{name}"]
    return ((weight.view(torch.int16).int() << 16) + remainder.int()).view(torch.float32).double()


def _random_weights(model: LanguageModel, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """bf16 numbers in fp32; the same on both devices."""
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        if "norm" in name or parameter.dim() == 1:
            noise = 0.1 * noise + float(parameter.detach().float().mean())
        else:
            noise *= parameter.shape[-1] ** -0.5
        yield name, noise.bfloat16().float().to(device)


def _part_of(trainer: ParallelTrainer) -> Callable[[str, Tensor], Tensor]:
    def part(name: str, whole: Tensor) -> Tensor:
        stored = trainer.optimizer.shards[name].stored
        assert isinstance(stored, DTensor)
        (chunk,) = stored.__create_chunk_list__()  # the question that torch's checkpoints ask
        return whole[tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))]

    return part


def _rms(found: StepResult, wanted: StepResult) -> float:
    pairs = zip(found.policy, wanted.policy, strict=True)
    return float(torch.cat([a.log_probs - b.log_probs for a, b in pairs]).double().square().mean().sqrt())


def _relative(parts: tuple[dict[str, list[float]], ...]) -> dict[str, float]:
    """Of all parts of every tensor: the length of the error over the length of the movement; "" is all of them."""
    names = dict.fromkeys(name for part in parts for name in part)
    sums = {name: [sum(part[name][i] for part in parts if name in part) for i in (0, 1)] for name in names}
    sums[""] = [sum(pair[i] for pair in sums.values()) for i in (0, 1)]
    return {name: math.sqrt(error / max(size, 1e-300)) for name, (error, size) in sums.items()}


def _length(movement: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in movement.values()))


def _is_equal(one: Outcome, other: Outcome) -> bool:
    """Bit for bit."""
    return (
        all(a.metrics == b.metrics for a, b in zip(one.results, other.results, strict=True))
        and all(
            torch.equal(p.log_probs, q.log_probs)
            for a, b in zip(one.results, other.results, strict=True)
            for p, q in zip(a.policy, b.policy, strict=True)
        )
        and all(torch.equal(a[n], b[n]) for a, b in zip(one.movements, other.movements, strict=True) for n in a)
    )


def starved_ranks(device: torch.device) -> dict[str, float]:
    """Experts over two ranks where one rank has no tokens, or no token chooses one rank's experts: the relative error
    of outputs and gradients against all experts on one device, the largest of both ranks."""
    group, rank = dist.group.WORLD, dist.get_rank()
    assert group is not None
    draw = torch.Generator().manual_seed(5)
    width, inner, experts, slots = 256, 128, 8, 2
    gate_up, down = (
        (torch.randn(shape, generator=draw) / 16).to(device, torch.bfloat16)
        for shape in ((experts, 2 * inner, width), (experts, width, inner))
    )
    errors = {}
    for name, counts, highest in (
        ("tokens on one rank only", (37, 0), experts), ("experts of one rank only", (20, 17), experts // 2),
        ("one token", (1, 0), 2), ("no tokens", (0, 0), experts),
    ):  # fmt: skip
        total, ends = sum(counts), [0, counts[0], sum(counts)]
        x = torch.randn(total, width, generator=draw).to(device, torch.bfloat16)
        chosen = torch.rand(total, highest, generator=draw).topk(slots).indices.to(device)
        weights = torch.rand(total, slots, generator=draw).to(device, torch.bfloat16)
        upstream = torch.randn(total, width, generator=draw).to(device, torch.bfloat16)
        wanted = _values_and_gradients(grouped_experts, x, chosen, weights, gate_up, down, upstream)
        mine = slice(*list(pairwise(ends))[rank])
        here = slice(rank * experts // 2, (rank + 1) * experts // 2)
        found = _values_and_gradients(
            AllToAllExperts(group, 1), x[mine], chosen[mine], weights[mine], gate_up[here], down[here], upstream[mine]
        )
        parts = [want[rows] for want, rows in zip(wanted, (mine, mine, mine, here, here), strict=True)]
        error = max(_relative_error(a, b) for a, b in zip(found, parts, strict=True))
        everybodys: list[Any] = [None, None]
        dist.all_gather_object(everybodys, error)
        errors[name] = max(everybodys)
    return errors


def _values_and_gradients(
    compute: Any, x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, upstream: Tensor
) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, weights, gate_up, down)]
    out = compute(leaves[0], chosen, *leaves[1:])
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    difference, size = float((found.double() - wanted.double()).norm()), float(wanted.double().norm())
    return difference / size if size else difference
