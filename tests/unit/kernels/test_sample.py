from __future__ import annotations

import math

import pytest
import torch

from lockstep.kernels.sample import sample_tokens
from lockstep.rollout.embedded.sampler import sample


def test_a_uniform_number_falls_on_the_token_whose_share_holds_it() -> None:
    """Shares 0, 1/2, 0, 1/4, 1/4: steps at 0, 0.5 and 0.75. What has no share is never drawn."""
    shares = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25]).log()
    uniforms = [0.0, 0.499, 0.501, 0.749, 0.751, 1 - 2**-53]
    tokens, log_probs = sample_tokens(shares.expand(6, 5), torch.ones(6), torch.tensor(uniforms, dtype=torch.float64))
    assert tokens.tolist() == [1, 1, 3, 3, 4, 4]
    wanted = [math.log(0.5)] * 2 + [math.log(0.25)] * 4
    torch.testing.assert_close(log_probs, torch.tensor(wanted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_draws_what_the_sampler_draws(dtype: torch.dtype) -> None:
    """The same operations: equal bits, greedy rows and uneven temperatures among them."""
    draw = torch.Generator().manual_seed(0)
    logits = (torch.randn(50, 999, generator=draw) * 3).to(dtype)
    temperatures = torch.rand(50, generator=draw) + 0.2
    temperatures[::7] = 0.0
    uniforms = torch.rand(50, generator=draw, dtype=torch.float64)
    wanted = sample(logits, temperatures, uniforms)
    tokens, log_probs = sample_tokens(logits, temperatures, uniforms)
    assert torch.equal(tokens, wanted.tokens_B)
    assert torch.equal(log_probs, wanted.log_probs_B)
    assert torch.equal(log_probs[::7], logits[::7].float().log_softmax(-1).amax(1))
