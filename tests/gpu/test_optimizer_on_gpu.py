"""The optimizer's kernel against its specification, and streamed state against state on the GPU: bit for bit."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lockstep.config import OptimizerOptions
from lockstep.kernels.adamw import AdamWStep, State, adamw, adamw_reference, state_layout
from lockstep.trainer.optimizer import Optimizer
from lockstep.trainer.optimizer.streaming import PIECE

FORMATS = ["fp32", "bf16", "8bit"]
SHAPES = [(64, 2048), (33, 768), (7, 200), (5, 4), (1, 130)]


def fresh_state(weight: Tensor, exp_avg: Any, exp_avg_sq: Any) -> State:
    layout = state_layout(weight.shape, weight.dtype, exp_avg, exp_avg_sq)
    return {name: torch.zeros(shape, dtype=dtype, device=weight.device) for name, shape, dtype in layout}


def bits(tensor: Tensor) -> Tensor:
    return tensor.cuda().view(-1).view(torch.uint8)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("exp_avg", "exp_avg_sq"), list(product(FORMATS, FORMATS)))
def test_the_kernel_gives_the_specifications_bits(
    exp_avg: str, exp_avg_sq: str, dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    """Four steps over shapes that fill blocks and rows and that do not, with gradients over ten powers of ten."""
    torch.manual_seed(0)
    for rows, width in SHAPES:
        weight = torch.randn(rows, width).to(dtype)
        on_gpu = weight.cuda()
        wanted, got = fresh_state(weight, exp_avg, exp_avg_sq), fresh_state(on_gpu, exp_avg, exp_avg_sq)
        for number in range(1, 5):
            grad = (torch.randn(rows, width) * 10 ** (-10 * torch.rand(rows, width))).to(grad_dtype)
            step = AdamWStep(1e-2, 0.9, 0.98, 1e-8, 0.1, number, 0.37, seed=2654435761 * number % 2**32)
            adamw_reference(weight, grad, wanted, step, first_element=77)
            adamw(on_gpu, grad.cuda(), got, step, first_element=77)
        for name, tensor in wanted.items():
            assert torch.equal(bits(tensor), bits(got[name])), (name, rows, width)
        assert torch.equal(bits(weight), bits(on_gpu)), (rows, width)


# Streaming


class Weights(nn.Module):
    """One weight of three and a half pieces, small ones around it, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator("cuda").manual_seed(0)
        shapes = {"first": (1024, 512), "large": (7 * PIECE // 2048, 1024), "vector": (1000,), "last": (3, 700, 300)}
        for name, shape in shapes.items():
            drawn = torch.randn(shape, generator=draw, device="cuda").bfloat16()
            self.register_parameter(name, nn.Parameter(drawn))

    def backward(self, seed: int, scale: float = 1.0) -> None:
        draw = torch.Generator("cuda").manual_seed(seed)
        for parameter in self.parameters():
            parameter.backward(scale * torch.randn(parameter.shape, generator=draw, device="cuda").bfloat16())


def optimizer_of(model: Weights, moments: str, **changes: Any) -> Optimizer:
    options = {"use_precision_aware_optimizer": True, "exp_avg_dtype": moments, "exp_avg_sq_dtype": moments}
    return Optimizer(model, OptimizerOptions(**(options | {"main_grads_dtype": "bf16"} | changes)))


def assert_same(one: Optimizer, other: Optimizer) -> None:
    for (name, a), (_, b) in zip(one.named_state(), other.named_state(), strict=True):
        assert torch.equal(bits(a), bits(b)), name
    for name, parameter in one.parameters.items():
        assert torch.equal(parameter, other.parameters[name]), name


@pytest.mark.parametrize("moments", FORMATS)
@pytest.mark.parametrize("overlap", [False, True])
def test_streamed_state_gives_the_numbers_of_state_on_the_gpu(moments: str, overlap: bool) -> None:
    """Three steps back to back, so that a step reads what the one before it is still writing."""
    resident, streamed = Weights(), Weights()
    optimizers = [
        optimizer_of(resident, moments),
        optimizer_of(streamed, moments, optimizer_cpu_offload=True, overlap_cpu_optimizer_d2h_h2d=overlap),
    ]
    homes = {name: (t.device.type, t.is_pinned()) for name, t in optimizers[1].named_state() if name != "step"}
    assert {home for name, home in homes.items() if name.endswith((".first", ".large", ".last"))} == {("cpu", True)}
    assert {home for name, home in homes.items() if name.endswith(".vector")} == {("cuda", False)}
    for step in range(3):
        norms = []
        for model, optimizer in zip((resident, streamed), optimizers, strict=True):
            model.backward(step)
            norms.append(optimizer.step(1e-2))
        assert norms[0] == norms[1]
    assert_same(*optimizers)

    before = {name: tensor.clone() for name, tensor in optimizers[1].named_state()}
    streamed.backward(9, scale=math.inf)
    assert not math.isfinite(optimizers[1].step(1e-2))
    assert all(torch.equal(bits(before[name]), bits(t)) for name, t in optimizers[1].named_state())


def test_a_step_that_was_only_started_is_seen_after_waiting() -> None:
    one, other = Weights(), Weights()
    optimizers = [
        optimizer_of(one, "8bit"),
        optimizer_of(other, "8bit", optimizer_cpu_offload=True, overlap_cpu_optimizer_d2h_h2d=True),
    ]
    for model in (one, other):
        model.backward(0)
    optimizers[0].step(1e-2)
    optimizers[1].start_step(1e-2)
    for name, parameter in other.named_parameters():
        optimizers[1].wait([name])
        assert torch.equal(parameter, optimizers[0].parameters[name]), name


def test_offloaded_state_takes_no_memory_of_the_gpu_but_its_buffers() -> None:
    model = Weights()
    numbers = sum(parameter.numel() for parameter in model.parameters())
    before = torch.cuda.memory_allocated()
    optimizer = optimizer_of(model, "8bit", optimizer_cpu_offload=True)
    assert torch.cuda.memory_allocated() - before < 1.1 * PIECE * (4 + 8 / 128)
    assert optimizer._placement.host_bytes > 4 * 0.99 * numbers
