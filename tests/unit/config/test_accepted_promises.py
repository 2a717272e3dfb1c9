"""Accepted flags ask for what happens anyway; here is that it does."""

from __future__ import annotations

import pytest
import torch
from tiny_models import packed_logits, random_documents, tiny_moe
from torch import nn

from lockstep.algorithms import SftLoss
from lockstep.config import BatchingOptions, OptimizerOptions
from lockstep.kernels.attention import PackedAttention, packed_attention_reference
from lockstep.models.layers.moe import Router
from lockstep.trainer.batch import TrainSample
from lockstep.trainer.local import LocalTrainer
from lockstep.trainer.optimizer import Optimizer, learning_rate

BF16_ROUNDING = 2.0**-8
"""Largest relative error of one bf16 number."""


def test_gradients_are_accumulated_in_fp32():
    """--accumulate-allreduce-grads-in-fp32: in bf16, 1 + 1/512 is 1 however often it is added."""
    layer = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    optimizer = Optimizer(layer, OptimizerOptions())
    for gradient in [1.0] + 64 * [1 / 512]:
        (layer.weight * gradient).sum().backward()
    grad = optimizer.gradients["weight"]
    assert (grad.dtype, grad.item()) == (torch.float32, 1 + 64 / 512)


def test_the_routers_scores_are_normalised_in_fp32():
    """--moe-router-dtype fp32"""
    torch.manual_seed(0)
    router = Router(hidden_size=32, num_experts=128).bfloat16()
    x_TD = torch.randn(16, 32, dtype=torch.bfloat16)
    scores_TE = router(x_TD)
    logits_TE = (x_TD @ router.weight.T).float()
    assert scores_TE.dtype == torch.float32
    torch.testing.assert_close(scores_TE, logits_TE.exp() / logits_TE.exp().sum(-1, keepdim=True))


def test_the_attentions_softmax_is_as_exact_as_its_output_can_say():
    """--attention-softmax-in-fp32: against fp32 throughout, only the rounding of weights and output is lost."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(300, 2, 16, dtype=torch.bfloat16) for _ in range(3))
    ours = PackedAttention([300], torch.device("cpu"))(q, k, v).float()
    exact = packed_attention_reference(q.float(), k.float(), v.float(), [300])
    assert (ours - exact).abs().max() <= 2 * BF16_ROUNDING * v.float().abs().max()


def test_training_drops_nothing_out():
    """--attention-dropout 0 and --hidden-dropout 0: two forwards in training mode are equal."""
    model, documents = tiny_moe().train(), random_documents([9, 4])
    assert torch.equal(packed_logits(model, documents), packed_logits(model, documents))


def test_no_expert_turns_a_token_away():
    """--moe-token-drop-policy: 200 equal tokens want the same experts, and the last gets what the first gets."""
    first, *others = packed_logits(tiny_moe(), [[5] * 200]).unbind()
    torch.testing.assert_close(torch.stack(others), first.expand(len(others), -1), atol=1e-4, rtol=1e-4)


def test_warm_up_starts_at_zero():
    """--lr-warmup-init 0: step k of n runs at (k + 1) / n of the rate, so that step -1 would be at 0."""
    options = OptimizerOptions(lr=1.0, lr_warmup_iters=4, lr_decay_style="constant")
    rates = [learning_rate(options, step, num_steps=10) for step in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recomputing_changes_no_gradient(granularity):
    """--recompute-granularity"""
    assert torch.equal(_gradient(granularity), _gradient(None))


def _gradient(granularity: str | None) -> torch.Tensor:
    trainer = LocalTrainer(
        tiny_moe(),
        reference=None,
        loss=SftLoss(),
        optimizer=OptimizerOptions(lr=0.1, lr_decay_style="constant"),
        batching=BatchingOptions(recompute_granularity=granularity),
        temperature=1.0,
        needs_entropy=False,
        routing="own",
        num_steps=1,
    )
    tokens = random_documents([12])[0]
    trainer.step([TrainSample(tokens=tokens, response_length=8, loss_mask=[1] * 8, loss_weight=1 / 8)])
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
