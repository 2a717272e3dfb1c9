from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, packed_logits, tiny_dense, tiny_moe, tiny_trainer
from torch.utils._python_dispatch import TorchDispatchMode

from lockstep.models.layers.moe import RecordRoutes
from lockstep.trainer.batch import TrainSample


def samples(count: int = 4, seed: int = 0, **fields: Any) -> list[TrainSample]:
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        response = draw.randrange(1, 9)
        tokens = [draw.randrange(VOCAB) for _ in range(4 + response)]
        defaults = {"loss_weight": 1 / 20, "advantage": draw.uniform(-1, 1)}
        made.append(TrainSample(tokens, response, [1] * response, **(defaults | fields)))
    return made


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_log_probs_come_back_in_the_order_of_the_samples_whatever_the_packing() -> None:
    model, batch = tiny_moe(), samples(7)
    trainer = tiny_trainer(model, temperature=0.7, batching={"use_dynamic_batch_size": True, "max_tokens_per_gpu": 20})
    for sample, result in zip(batch, trainer.log_probs(batch), strict=True):
        logits = packed_logits(model, [sample.tokens]).detach()[-sample.response_length - 1 : -1] / 0.7
        targets = torch.tensor(sample.tokens[-sample.response_length :])
        wanted = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        torch.testing.assert_close(result.log_probs, wanted, rtol=1e-5, atol=1e-5)


def test_a_step_reports_the_log_probs_from_before_it() -> None:
    trainer, batch = tiny_trainer(tiny_moe(), lr=0.3), samples()
    before = trainer.log_probs(batch)
    reported = trainer.step(batch).policy
    after = trainer.log_probs(batch)
    for was, said, now in zip(before, reported, after, strict=True):
        torch.testing.assert_close(said.log_probs, was.log_probs, rtol=1e-5, atol=1e-5)
        assert not said.log_probs.requires_grad
        assert (now.log_probs - was.log_probs).abs().max() > 1e-3


def test_a_step_makes_rewarded_responses_likelier_and_punished_ones_less_likely() -> None:
    trainer, batch = tiny_trainer(tiny_moe(), lr=1e-3), samples()
    for sample, advantage in zip(batch, (1.0, -1.0, 1.0, -1.0), strict=True):
        sample.advantage = advantage
    before = [r.log_probs.sum() for r in trainer.log_probs(batch)]
    trainer.step(batch)
    after = [r.log_probs.sum() for r in trainer.log_probs(batch)]
    assert [bool(now > was) for was, now in zip(before, after, strict=True)] == [True, False, True, False]


def test_a_step_counts_and_tells_rate_norm_and_batch_size() -> None:
    trainer = tiny_trainer(tiny_dense(), lr=0.1, lr_decay_style="linear")
    metrics = [trainer.step(samples()).metrics for _ in range(2)]
    assert [m["train/lr-pg_0"] for m in metrics] == pytest.approx([0.1, 0.09])
    assert [m["train/global_batch_size"] for m in metrics] == [4, 4]
    assert all(m["train/grad_norm"] > 0 for m in metrics)
    assert (trainer.version, trainer.num_steps_done, trainer.optimizer.num_updates) == (2, 2, 2)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted() -> None:
    model = tiny_dense()
    trainer = tiny_trainer(model)
    good, bad = samples(), samples(advantage=math.nan)
    trainer.step(good)
    before = weights(model)
    metrics = trainer.step(bad).metrics
    assert metrics["train/skipped_steps"] == 1
    assert not math.isfinite(metrics["train/grad_norm"])
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert trainer.step(good).metrics["train/skipped_steps"] == 0
    assert trainer.optimizer.num_updates == 2


def test_the_reference_stays_frozen_until_it_is_made_the_policy() -> None:
    policy, reference = tiny_moe(), tiny_moe()
    trainer, batch = tiny_trainer(policy, reference=reference.requires_grad_(False), lr=0.3), samples()
    start = [r.log_probs for r in trainer.log_probs(batch)]
    trainer.step(batch)
    frozen = [r.log_probs for r in trainer.log_probs(batch, reference=True)]
    torch.testing.assert_close(frozen, start, rtol=1e-5, atol=1e-5)
    trainer.update_reference()
    torch.testing.assert_close(
        [r.log_probs for r in trainer.log_probs(batch, reference=True)],
        [r.log_probs for r in trainer.log_probs(batch)],
    )
    assert all(
        p.data_ptr() != q.data_ptr() for p, q in zip(policy.parameters(), reference.parameters(), strict=True)
    ), "the reference must not follow the policy"


# Routes


def own_routes(model: Any, sample: TrainSample) -> np.ndarray:
    record = RecordRoutes()
    packed_logits(model, [sample.tokens], record)
    return record.stacked()[:-1].numpy()


def other_routes(model: Any, sample: TrainSample) -> np.ndarray:
    return (own_routes(model, sample) + 1) % model.config.num_experts


def test_replayed_routes_decide_which_experts_serve_and_own_routes_do_not() -> None:
    model, batch = tiny_moe(), samples()
    plain = [r.log_probs for r in tiny_trainer(model).log_probs(batch)]
    for sample in batch:
        sample.routed_experts = own_routes(model, sample)
    replayed = tiny_trainer(model, routing="rollout").log_probs(batch)
    torch.testing.assert_close([r.log_probs for r in replayed], plain)
    for sample in batch:
        sample.routed_experts = other_routes(model, sample)
    moved = tiny_trainer(model, routing="rollout").log_probs(batch)
    compared = tiny_trainer(model, routing="own").log_probs(batch)
    assert all((m.log_probs - p).abs().max() > 1e-3 for m, p in zip(moved, plain, strict=True))
    torch.testing.assert_close([r.log_probs for r in compared], plain)
    assert all(r.routes_differ is not None and r.routes_differ.all() for r in compared)


@pytest.mark.parametrize("flipped", [0, 3, 4, 7])
def test_routes_differ_from_the_prediction_whose_token_has_other_experts(flipped: int) -> None:
    """Four tokens of prompt: predictions are made at tokens 3, 4 and on. All later ones read what a token left."""
    model, batch = tiny_moe(), samples(3, seed=1)
    for sample in batch:
        sample.routed_experts = own_routes(model, sample)
        sample.routed_experts[flipped : flipped + 1] = other_routes(model, sample)[flipped : flipped + 1]
    for result in tiny_trainer(model, routing="own").log_probs(batch):
        assert result.routes_differ is not None
        assert result.routes_differ.tolist() == [3 + i >= flipped for i in range(len(result.log_probs))]


def test_replay_does_not_depend_on_whether_a_neighbour_has_a_record() -> None:
    model, batch = tiny_moe(), samples(2)
    batch[0].routed_experts = other_routes(model, batch[0])
    trainer = tiny_trainer(model, routing="rollout")
    together = [r.log_probs for r in trainer.log_probs(batch)]
    alone = [trainer.log_probs([sample])[0].log_probs for sample in batch]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_replayed_experts_still_learn_through_the_router() -> None:
    """R3 fixes the choice; the weights come from the current router, so it gets a gradient."""
    model, batch = tiny_moe(norm_topk_prob=True, num_experts_per_tok=2), samples()
    for sample in batch:
        sample.routed_experts = other_routes(model, sample)
    trainer = tiny_trainer(model, routing="rollout", adam_beta1=0.0)
    trainer.step(batch)
    moments = {n: t for n, t in trainer.optimizer.named_state() if n.startswith("exp_avg.") and "mlp.gate" in n}
    assert len(moments) == model.config.num_sparse_layers
    assert all(t.abs().max() > 0 for t in moments.values())


def test_old_routing_replays_the_pass_that_computed_the_old_log_probs_on_later_steps() -> None:
    """R2: after the weights have moved, training still goes through the experts of the old pass."""
    model, batch = tiny_moe(), samples()
    wanted = [own_routes(model, sample) for sample in batch]
    for sample in batch:
        sample.routed_experts = other_routes(model, sample)  # the sampler's, which R2 does not use
    trainer = tiny_trainer(model, routing="old", lr=0.5)
    compared = trainer.log_probs(batch)
    assert all(r.routes_differ is not None and r.routes_differ.all() for r in compared), "flips are traced here too"
    for sample, routes in zip(batch, wanted, strict=True):
        assert sample.routed_experts is not None
        assert (sample.routed_experts[:-1] == routes).all()
    trainer.step(batch)
    assert any((own_routes(model, s) != w).any() for s, w in zip(batch, wanted, strict=True)), "the step moved routes"
    under_old_routes = trainer.step(batch).policy
    model_now = tiny_moe()
    model_now.load_state_dict(model.state_dict())
    assert len(under_old_routes) == len(batch)
    assert all((s.routed_experts[:-1] == w).all() for s, w in zip(batch, wanted, strict=True))  # type: ignore[index]


# Memory


class _PeakTensor(TorchDispatchMode):
    """Size of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_a_training_step_never_holds_the_logits_of_all_tokens() -> None:
    """1024 predictions of a vocabulary of 8192 would be 8 million numbers; chunks of 64 keep to half a million."""
    model = tiny_dense(vocab_size=8192, tie_word_embeddings=False)
    long = [TrainSample(list(range(1, 514)), 512, [1] * 512, loss_weight=1 / 1024, advantage=1.0) for _ in range(2)]
    trainer = tiny_trainer(
        model, batching={"use_dynamic_batch_size": True, "max_tokens_per_gpu": 2048, "log_probs_chunk_size": 64}
    )
    with _PeakTensor() as peak:
        trainer.log_probs(long)
        trainer.step(long)
    assert peak.elements <= max(64 * 8192, 8192 * model.config.hidden_size, 512 * 512 * 2 * 6)
    assert peak.elements < 1024 * 8192 / 8


@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_trainer_goes_on_as_if_it_had_not_stopped(tmp_path: Path, moments: str, dtype: torch.dtype) -> None:
    small = {"use_precision_aware_optimizer": True, "exp_avg_dtype": moments, "exp_avg_sq_dtype": moments}
    batches = [samples(seed=seed) for seed in range(3)]
    one = tiny_trainer(tiny_moe().to(dtype), **small)
    one.step(batches[0])
    one.save(tmp_path)
    counters = one.state_dict()
    wanted = [one.step(batch).metrics for batch in batches[1:]]

    other = tiny_trainer(tiny_moe().to(dtype), **small)
    other.load(tmp_path)
    other.load_state_dict(counters)
    assert [other.step(batch).metrics for batch in batches[1:]] == wanted
    assert all(torch.equal(p, q) for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True))
