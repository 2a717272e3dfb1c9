from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from lockstep.config import OptimizerOptions
from lockstep.trainer.optimizer import Optimizer, learning_rate

HYPER: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_eps": 1e-6}


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.LayerNorm(3)).to(dtype)


def loss_of(model: nn.Module, step: int, scale: float = 1.0) -> torch.Tensor:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
    return scale * (model(x.to(next(model.parameters()).dtype)).float() ** 2 + model[0].weight.float().sum()).sum()


def torch_adamw(model: nn.Module) -> torch.optim.AdamW:
    """Matrices decay, vectors do not."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-6)


@pytest.mark.parametrize("clip_grad", [0.0, 0.5, 1e6])
def test_steps_are_those_of_adamw_after_clipping_by_the_global_norm(clip_grad: float) -> None:
    ours = small_model()
    theirs = copy.deepcopy(ours)
    optimizer, reference = Optimizer(ours, OptimizerOptions(**HYPER, clip_grad=clip_grad)), torch_adamw(theirs)
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
            # Fused and plain AdamW round differently, by 1e-4 of a step.
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-4 * HYPER["lr"])
            assert p.grad is None


def test_bf16_weights_are_the_rounded_masters_and_small_updates_are_not_lost() -> None:
    """At rate 1e-5 a bf16 weight alone would never move: its spacing is 2^-9 of its size."""
    ours = small_model(torch.bfloat16)
    exact = small_model(torch.bfloat16).float()
    optimizer = Optimizer(ours, OptimizerOptions(**HYPER, clip_grad=0.0))
    before = [p.detach().clone() for p in ours.parameters()]
    reference = torch_adamw(exact)
    for step in range(60):
        loss_of(ours, step).backward()
        for p, q in zip(ours.parameters(), exact.parameters(), strict=True):
            assert p.grad is None, "gradients move to the fp32 masters"
            q.grad = optimizer.masters[next(n for n, o in ours.named_parameters() if o is p)].grad.clone()
        for group in reference.param_groups:
            group["lr"] = 1e-5
        reference.step()
        optimizer.step(1e-5)
    for (name, p), q, old in zip(ours.named_parameters(), exact.parameters(), before, strict=True):
        torch.testing.assert_close(optimizer.masters[name], q, rtol=1e-6, atol=1e-8)
        assert torch.equal(p, q.bfloat16())
        assert not torch.equal(optimizer.masters[name], old.float())


def test_gradients_of_bf16_weights_accumulate_in_fp32() -> None:
    """Adding 1/512 to 1 in bf16 changes nothing."""
    layer = nn.Linear(1, 1, bias=False).bfloat16()
    optimizer = Optimizer(layer, OptimizerOptions(**HYPER))
    for size in (1.0, 1 / 512, 1 / 512):
        (layer.weight * torch.tensor(size, dtype=torch.bfloat16)).sum().backward()
    assert optimizer.masters["weight"].grad.item() == 1 + 2 / 512  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(broken: float, dtype: torch.dtype) -> None:
    model = small_model(dtype)
    optimizer = Optimizer(model, OptimizerOptions(**HYPER))
    loss_of(model, 0).backward()
    optimizer.step(0.01)
    before = {name: tensor.clone() for name, tensor in optimizer.named_state()}
    weights = [p.detach().clone() for p in model.parameters()]

    loss_of(model, 1, scale=broken).backward()
    assert not math.isfinite(optimizer.step(0.01))

    assert optimizer.num_updates == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in optimizer.named_state())
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    loss_of(model, 1).backward()
    assert math.isfinite(optimizer.step(0.01)), "the broken gradient is gone"


SCHEDULES = [
    ({"lr_decay_style": "constant"}, [1.0] * 8),
    ({"lr_decay_style": "constant", "lr_warmup_iters": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
    ({"lr_decay_style": "linear"}, [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
    ({"lr_decay_style": "linear", "min_lr": 0.2, "lr_decay_iters": 4}, [1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2, 0.2]),
    ({"lr_decay_style": "linear", "lr_warmup_fraction": 0.5}, [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
    (
        {"lr_decay_style": "cosine", "min_lr": 0.5, "lr_warmup_iters": 2, "lr_decay_iters": 6},
        [0.5, 1, 1, 0.75 + 0.25 * math.cos(math.pi / 4), 0.75, 0.75 - 0.25 * math.cos(math.pi / 4), 0.5, 0.5],
    ),
]


@pytest.mark.parametrize(("options", "wanted"), SCHEDULES, ids=str)
def test_the_rate_warms_up_and_falls_as_worked_out_by_hand(options: dict[str, Any], wanted: list[float]) -> None:
    schedule = OptimizerOptions(lr=1.0, **options)
    assert [learning_rate(schedule, step, num_steps=8) for step in range(8)] == pytest.approx(wanted)
