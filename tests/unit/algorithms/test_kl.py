from __future__ import annotations

import math

import pytest
import torch

from lockstep.algorithms import kl_penalty
from lockstep.algorithms.kl import KL_ESTIMATORS

LOG_RATIO = math.log(2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("k1", LOG_RATIO), ("k2", LOG_RATIO**2 / 2), ("k3", 0.5 - 1 + LOG_RATIO), ("low_var_kl", 0.5 - 1 + LOG_RATIO)],
)
def test_estimates_when_the_policy_is_twice_as_likely(name, expected):
    torch.testing.assert_close(kl_penalty(torch.tensor(LOG_RATIO), name), torch.tensor(expected))
    weighted = kl_penalty(torch.tensor(LOG_RATIO), name, importance_ratio=torch.tensor(3.0))
    torch.testing.assert_close(weighted, torch.tensor(3 * expected))


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_unbiased_estimators_average_to_the_kl(name):
    """Over samples of the policy, in expectation computed exactly."""
    random = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 11, generator=random, dtype=torch.float64).log_softmax(-1)
    kl = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * kl_penalty(policy - reference, name)).sum(), kl)


def test_the_importance_ratio_makes_the_gradient_that_of_the_kl():
    """Sampled from the old policy, the gradient of ratio * k3 is in expectation the gradient of KL(policy || ref)."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(11, generator=random, dtype=torch.float64, requires_grad=True)
    old, reference = torch.randn(2, 11, generator=random, dtype=torch.float64).log_softmax(-1)
    policy = logits.log_softmax(-1)
    (expected,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    estimate = kl_penalty(policy - reference, "k3", importance_ratio=torch.exp(policy - old))
    (actual,) = torch.autograd.grad((old.exp() * estimate).sum(), logits)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", sorted(KL_ESTIMATORS))
def test_only_low_var_kl_is_clamped(name):
    log_ratio = torch.tensor([-20.0, 30.0, -1.0])
    expected = {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": torch.exp(-log_ratio) - 1 + log_ratio}
    expected["low_var_kl"] = expected["k3"].clamp(-10, 10)
    torch.testing.assert_close(kl_penalty(log_ratio, name), expected[name])


def test_the_clamp_comes_after_the_importance_ratio():
    kl = kl_penalty(torch.tensor(-2.0), "low_var_kl", importance_ratio=torch.tensor(50.0))
    assert kl.item() == 10.0


def test_k3_does_not_cancel_near_zero():
    log_ratio = torch.tensor(1e-3)
    exact = math.expm1(-1e-3) + 1e-3
    assert kl_penalty(log_ratio, "k3").item() == pytest.approx(exact, rel=1e-3)
