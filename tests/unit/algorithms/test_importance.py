from __future__ import annotations

import math

import torch

from lockstep.algorithms import importance_ratio, sequence_log_ratio, truncated_importance_weights


def test_a_ratio_beyond_fp32_stays_finite():
    ratios = importance_ratio(torch.tensor([0.0, math.log(2), 200.0, -200.0]))
    torch.testing.assert_close(ratios[:2], torch.tensor([1.0, 2.0]))
    assert ratios[2].isfinite()
    assert ratios[3] == 0


def test_a_sequence_ratio_is_the_geometric_mean_over_the_masked_tokens():
    log_ratio = torch.tensor([0.3, 9.0, -0.1, 0.4, 5.0], requires_grad=True)
    mask = torch.tensor([True, False, True, True, False])
    sample_ids = torch.tensor([0, 0, 0, 1, 3])
    result = sequence_log_ratio(log_ratio, mask, sample_ids)
    torch.testing.assert_close(result, torch.tensor([0.1, 0.1, 0.1, 0.4, 0.0]))
    (result * torch.tensor([1.0, 10.0, 100.0, 1.0, 1.0])).sum().backward()
    torch.testing.assert_close(log_ratio.grad, torch.tensor([55.5, 0.0, 55.5, 1.0, 0.0]))


def test_no_tokens_have_no_sequence_ratio():
    empty = torch.empty(0)
    assert sequence_log_ratio(empty, empty.bool(), empty.long()).shape == (0,)


def test_truncated_weights_and_their_metrics():
    log_ratio = torch.tensor([0.5, 1.0, 1.5, 4.0]).log().requires_grad_()
    weights, metrics = truncated_importance_weights(log_ratio, tis_clip=2.0, tis_clip_low=0.75)
    torch.testing.assert_close(weights, torch.tensor([0.75, 1.0, 1.5, 2.0]))
    torch.testing.assert_close(metrics["tis"], torch.tensor([0.5, 1.0, 1.5, 4.0]))
    torch.testing.assert_close(metrics["tis_clipfrac"], torch.tensor([1.0, 0.0, 0.0, 1.0]))
    torch.testing.assert_close(metrics["tis_abs"], torch.tensor([0.5, 0.0, 0.5, 3.0]))
    assert not weights.requires_grad
