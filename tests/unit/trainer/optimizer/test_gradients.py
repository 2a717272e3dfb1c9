from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lockstep.trainer.optimizer.gradients import Gradients


def gradients_of(model: nn.Module, accumulate: torch.dtype, keep: torch.dtype) -> Gradients:
    return Gradients(dict(model.named_parameters()), accumulate=accumulate, keep=keep)


def add(layer: nn.Linear, size: float) -> None:
    """A backward whose gradient is `size` for every weight."""
    (layer.weight * torch.tensor(size, dtype=layer.weight.dtype)).sum().backward()


def test_sums_in_fp32_keep_what_bf16_would_round_away() -> None:
    """Adding 1/512 to 1 in bf16 changes nothing."""
    sums = {}
    for dtype in (torch.float32, torch.bfloat16):
        layer = nn.Linear(1, 1, bias=False).bfloat16()
        gradients = gradients_of(layer, dtype, dtype)
        for size in (1.0, 1 / 512, 1 / 512):
            add(layer, size)
        assert layer.weight.grad is None
        assert gradients["weight"].dtype == dtype
        sums[dtype] = gradients["weight"].item()
    assert sums == {torch.float32: 1 + 2 / 512, torch.bfloat16: 1.0}


def test_gradients_of_fp32_weights_are_fp32_whatever_is_asked_for() -> None:
    layer = nn.Linear(1, 1, bias=False)
    gradients = gradients_of(layer, torch.bfloat16, torch.bfloat16)
    for size in (1.0, 1 / 512, 1 / 512):
        add(layer, size)
    gradients.settle(["weight"])
    assert (gradients["weight"].dtype, gradients["weight"].item()) == (torch.float32, 1 + 2 / 512)


def test_the_norm_is_that_of_all_gradients_together() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(3, 1, bias=False)}).bfloat16()
    gradients = gradients_of(model, torch.float32, torch.float32)
    for layer, size in ((model["a"], 2.0), (model["b"], 4.0)):
        add(layer, size)
    assert gradients.norm() == pytest.approx(math.sqrt(4 * 4 + 3 * 16), rel=1e-6)


def test_a_settled_layer_is_kept_in_bf16_and_measured_in_fp32() -> None:
    """1 + 2/512 is 1 in bf16; the norm still has the 2/512."""
    model = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)}).bfloat16()
    gradients = gradients_of(model, torch.float32, torch.bfloat16)
    for size in (1.0, 1 / 512, 1 / 512):
        add(model["b"], size)
    gradients.settle(["b.weight"])
    add(model["a"], 3.0)
    assert (gradients["b.weight"].dtype, gradients["b.weight"].item()) == (torch.bfloat16, 1.0)
    assert gradients.norm() == pytest.approx(math.hypot(1 + 2 / 512, 3.0), rel=1e-6)


def test_a_gradient_that_comes_after_its_layer_was_settled_is_an_error() -> None:
    layer = nn.Linear(1, 1, bias=False)
    gradients = gradients_of(layer, torch.float32, torch.float32)
    add(layer, 1.0)
    gradients.settle(["weight"])
    with pytest.raises(AssertionError, match="weight was settled"):
        add(layer, 1.0)


@pytest.mark.parametrize("forget", [lambda gradients: gradients.take("weight"), Gradients.clear], ids=["take", "clear"])
def test_what_is_taken_or_cleared_is_gone_and_the_next_step_starts_anew(forget: Callable[[Gradients], object]) -> None:
    layer = nn.Linear(1, 1, bias=False)
    gradients = gradients_of(layer, torch.float32, torch.float32)
    add(layer, 2.0)
    gradients.settle(["weight"])
    forget(gradients)
    add(layer, 5.0)
    assert gradients.norm() == 5.0
    taken = gradients.take("weight")
    assert isinstance(taken, Tensor)
    assert taken.item() == 5.0
    assert gradients.take("weight") is None


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_one_broken_number_makes_the_norm_not_finite(broken: float) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    gradients = gradients_of(model, torch.float32, torch.float32)
    weights = torch.ones(4, 4)
    weights[2, 3] = broken
    ((model["a"].weight * weights).sum() + model["b"].weight.sum()).backward()
    assert not math.isfinite(gradients.norm())
