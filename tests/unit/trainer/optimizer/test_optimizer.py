from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lockstep.config import OptimizerOptions
from lockstep.kernels.adamw import join_master
from lockstep.trainer.optimizer import Optimizer

HYPER: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_eps": 1e-6}
FORMATS = ["fp32", "bf16", "8bit"]


def options(moments: str = "fp32", **changes: Any) -> OptimizerOptions:
    small = {"use_precision_aware_optimizer": True, "exp_avg_dtype": moments, "exp_avg_sq_dtype": moments}
    return OptimizerOptions(**(HYPER | small | changes))


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.LayerNorm(3)).to(dtype)


def loss_of(model: nn.Module, step: int, scale: float = 1.0) -> Tensor:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
    return scale * (model(x.to(next(model.parameters()).dtype)).float() ** 2 + model[0].weight.float().sum()).sum()


def torch_adamw(model: nn.Module) -> torch.optim.AdamW:
    """Matrices decay, vectors do not."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-6)


def state_of(optimizer: Optimizer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in optimizer.named_state()}


def master_of(optimizer: Optimizer, name: str) -> Tensor:
    return join_master(optimizer.parameters[name].detach(), dict(optimizer.named_state())[f"remainder.{name}"])


@pytest.mark.parametrize("clip_grad", [0.0, 0.5, 1e6])
def test_steps_are_those_of_adamw_after_clipping_by_the_global_norm(clip_grad: float) -> None:
    ours = small_model()
    theirs = copy.deepcopy(ours)
    optimizer, reference = Optimizer(ours, options(clip_grad=clip_grad)), torch_adamw(theirs)
    for step in range(5):
        rate = 0.01 / (step + 1)
        loss_of(ours, step).backward()
        loss_of(theirs, step).backward()
        wanted_norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip_grad or math.inf)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
        reference.zero_grad()
        assert optimizer.step(rate) == pytest.approx(float(wanted_norm), rel=1e-6)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            # Both round about ten times, in another order: to 1e-4 of a step.
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-4 * HYPER["lr"])
            assert p.grad is None


def test_bf16_weights_are_the_rounded_masters_and_small_updates_are_not_lost() -> None:
    """At rate 1e-5 a bf16 weight alone would never move: its spacing is 2^-9 of its size."""
    ours = small_model(torch.bfloat16)
    exact = small_model(torch.bfloat16).float()
    optimizer = Optimizer(ours, options(clip_grad=0.0))
    before = [p.detach().clone() for p in ours.parameters()]
    reference = torch_adamw(exact)
    for step in range(60):
        loss_of(ours, step).backward()
        for (name, p), q in zip(ours.named_parameters(), exact.parameters(), strict=True):
            assert p.grad is None, "gradients leave their parameters"
            q.grad = optimizer.gradients[name].clone()
        for group in reference.param_groups:
            group["lr"] = 1e-5
        reference.step()
        optimizer.step(1e-5)
    for (name, p), q, old in zip(ours.named_parameters(), exact.parameters(), before, strict=True):
        torch.testing.assert_close(master_of(optimizer, name), q, rtol=1e-6, atol=1e-8)
        assert torch.equal(p, master_of(optimizer, name).bfloat16())
        assert not torch.equal(master_of(optimizer, name), old.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", FORMATS)
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(broken: float, moments: str, dtype: torch.dtype) -> None:
    model = small_model(dtype)
    optimizer = Optimizer(model, options(moments))
    loss_of(model, 0).backward()
    optimizer.step(0.01)
    before = state_of(optimizer)
    weights = [p.detach().clone() for p in model.parameters()]

    loss_of(model, 1, scale=broken).backward()
    assert not math.isfinite(optimizer.step(0.01))

    assert optimizer.num_updates == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in optimizer.named_state())
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    loss_of(model, 1).backward()
    assert math.isfinite(optimizer.step(0.01)), "the broken gradient is gone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", FORMATS)
def test_the_named_state_and_the_weights_are_all_that_the_next_steps_depend_on(
    moments: str, dtype: torch.dtype
) -> None:
    """Also the random rounding: it goes by the seed, the step and the parameter, not by a generator."""
    one = small_model(dtype)
    optimizer = Optimizer(one, options(moments))
    for step in range(3):
        loss_of(one, step).backward()
        optimizer.step(0.01)
    other = small_model(dtype)
    resumed = Optimizer(other, options(moments))
    other.load_state_dict(one.state_dict())
    saved = state_of(optimizer)
    for name, tensor in resumed.named_state():
        tensor.copy_(saved[name])
    for step in range(3, 6):
        for number, (model, updates) in enumerate(((one, optimizer), (other, resumed))):
            torch.manual_seed(number)
            loss_of(model, step).backward()
            updates.step(0.01)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(state_of(optimizer).values(), state_of(resumed).values(), strict=True))


@pytest.mark.parametrize("moments", ["bf16", "8bit"])
def test_another_seed_rounds_small_moments_otherwise(moments: str) -> None:
    states = []
    for seed in (1, 1, 2):
        model = small_model()
        optimizer = Optimizer(model, options(moments, seed=seed))
        loss_of(model, 0).backward()
        optimizer.step(0.01)
        states.append(state_of(optimizer))
    keys = [name for name in states[0] if name.startswith((f"exp_avg_{moments}", f"exp_avg_sq_{moments}"))]
    has_dims = 0 if moments == "bf16" else 1  # vectors have no 8-bit moments
    assert len(keys) == 2 * sum(parameter.dim() > has_dims for parameter in small_model().parameters())
    assert all(torch.equal(states[0][key], states[1][key]) for key in keys)
    assert any(not torch.equal(states[0][key], states[2][key]) for key in keys)


def test_a_saved_name_tells_the_format_so_that_no_other_format_reads_it() -> None:
    """Of vectors, which every model has beside matrices, 8-bit moments are fp32."""
    names = {m: {n for n, _ in Optimizer(small_model(), options(m)).named_state() if n != "step"} for m in FORMATS}
    vectors = {name for name, parameter in small_model().named_parameters() if parameter.dim() == 1}
    assert not names["fp32"] & names["bf16"]
    assert names["fp32"] & names["8bit"] == {f"{key}.{name}" for key in ("exp_avg", "exp_avg_sq") for name in vectors}
    assert not names["bf16"] & names["8bit"]


@pytest.mark.parametrize("moments", FORMATS)
def test_restarting_takes_the_weights_as_they_are_and_forgets_the_rest(moments: str) -> None:
    model = small_model(torch.bfloat16)
    optimizer = Optimizer(model, options(moments))
    loss_of(model, 0).backward()
    optimizer.step(0.01)
    optimizer.restart()
    assert all(not tensor.any() for _, tensor in optimizer.named_state())
    assert torch.equal(master_of(optimizer, "0.weight"), model[0].weight.float())


@pytest.mark.parametrize("moments", FORMATS)
def test_on_a_cpu_offloading_changes_no_number(moments: str) -> None:
    models = [small_model(torch.bfloat16) for _ in range(2)]
    offloading = {"optimizer_cpu_offload": True, "overlap_cpu_optimizer_d2h_h2d": True}
    optimizers = [Optimizer(models[0], options(moments)), Optimizer(models[1], options(moments, **offloading))]
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            loss_of(model, step).backward()
            optimizer.step(0.01)
    plain, offloaded = (state_of(optimizer) for optimizer in optimizers)
    assert plain.keys() == offloaded.keys()
    assert all(torch.equal(plain[name], offloaded[name]) for name in plain)
