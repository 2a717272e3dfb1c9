from __future__ import annotations

import math

import pytest
import torch

from lockstep.errors import ParityError
from lockstep.parity import Parity, measure_parity, require_parity
from lockstep.trainer.engine import LogProbs
from lockstep.types import Sample


def sample(log_probs: list[float] | None, versions: list[str], mask: list[int] | None = None) -> Sample:
    length = len(log_probs) if log_probs is not None else 3
    return Sample(
        tokens=list(range(length + 2)),
        response_length=length,
        rollout_log_probs=log_probs,
        weight_versions=versions,
        loss_mask=mask,
    )


def trained(log_probs: list[float], differ: list[bool] | None = None) -> LogProbs:
    return LogProbs(torch.tensor(log_probs), None if differ is None else torch.tensor(differ))


def test_only_tokens_of_the_current_version_that_the_policy_wrote_are_compared() -> None:
    """Token 1 is of older weights, token 2 a tool's, token 4 has no version."""
    parity = measure_parity(
        [sample([-1.0] * 5, ["7", "6", "7", "7"], [1, 1, 0, 1, 1])], [trained([-1.5, 8.0, 9.0, -0.75, 5.0])], 7
    )
    assert parity is not None
    assert parity.abs_diff.tolist() == [0.5, 0.25]
    assert parity.mean == 0.375


def test_all_samples_count_token_by_token() -> None:
    samples = [sample([-1.0], ["0"]), sample([-1.0, -2.0, -3.0], ["0"] * 3)]
    parity = measure_parity(samples, [trained([-1.4]), trained([-1.0, -2.0, -3.0])], 0)
    assert parity is not None
    assert parity.metrics()["train/train_rollout_logprob_abs_diff"] == pytest.approx(0.1)
    assert parity.metrics()["train/train_rollout_logprob_abs_diff_max"] == pytest.approx(0.4)


def test_flips_are_counted_and_only_larger_differences_without_one_are_unexplained() -> None:
    """Differences: a flip that explains one, a flip without one, one without a flip, and rounding."""
    parity = measure_parity(
        [sample([0.0] * 4, ["0"] * 4)], [trained([0.01, 0.0, 0.01, 5e-5], [True, True, False, False])], 0
    )
    assert parity is not None
    assert parity.metrics()["train/routing_flips"] == 2
    assert parity.metrics()["train/logprob_diff_unexplained"] == 1


@pytest.mark.parametrize(
    "not_comparable", [sample(None, ["0"] * 3), sample([0.0] * 3, ["1"] * 3), sample([0.0] * 3, ["0"] * 3, [0, 0, 0])]
)
def test_nothing_to_compare_is_no_parity_rather_than_a_perfect_one(not_comparable: Sample) -> None:
    assert measure_parity([not_comparable], [trained([0.0] * 3)], 0) is None


def parity_of(*differences: float) -> Parity:
    return Parity(torch.tensor(differences), torch.zeros(len(differences), dtype=torch.bool))


def test_a_mean_within_the_limit_passes_and_one_above_stops_the_run() -> None:
    require_parity(parity_of(0.1, 0.3).metrics(), 0.21)
    with pytest.raises(ParityError) as raised:
        require_parity(parity_of(0.1, 0.3).metrics(), 0.19)
    assert raised.value.field == "train/train_rollout_logprob_abs_diff"
    assert raised.value.value == pytest.approx(0.2)
    assert "--logprob-diff-limit 0.19" in raised.value.reason


def test_a_difference_that_is_no_number_stops_the_run() -> None:
    with pytest.raises(ParityError):
        require_parity(parity_of(0.0, math.nan).metrics(), 1.0)


def test_a_token_that_the_sampler_held_for_impossible_stops_the_run() -> None:
    with pytest.raises(ParityError):
        require_parity(parity_of(0.0, math.inf).metrics(), 1.0)


def test_a_step_without_comparison_goes_on() -> None:
    require_parity({"train/loss": 9.0}, 0.5)
