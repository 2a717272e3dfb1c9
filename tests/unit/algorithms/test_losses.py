from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lockstep.algorithms import (
    Loss,
    LossInputs,
    SftLoss,
    clipped_policy_loss,
    loss_from_options,
    make_policy_loss,
    sample_loss_weights,
    token_loss_weights,
)
from lockstep.config import AlgorithmOptions
from lockstep.errors import OptionError


@dataclass
class SampleData:
    """One sample of a global batch, as float64 arrays over its response tokens."""

    rollout_id: int
    advantage: float
    mask: np.ndarray
    policy: np.ndarray
    old: np.ndarray
    rollout: np.ndarray
    ref: np.ndarray
    entropy: np.ndarray
    removed: bool = False


def global_batch(seed: int) -> list[SampleData]:
    """Ragged rollouts of one to three samples, tool tokens, a removed sample and one without a trained token."""
    random = np.random.default_rng(seed)
    batch = []
    for rollout_id in range(9):
        for _ in range(random.integers(1, 4)):
            length = random.integers(1, 12)
            policy = -random.exponential(1.0, length)
            drift = [policy + random.normal(0, 0.3, length) for _ in range(3)]
            batch.append(
                SampleData(
                    rollout_id, random.normal(), random.random(length) < 0.8, policy, *drift, random.random(length)
                )
            )
    batch[2].removed = True
    batch[4].mask[:] = False
    return batch


def reference(batch: list[SampleData], **options: Any) -> dict[str, float]:
    """The global loss and metrics, one sample and one token at a time."""
    o = SimpleNamespace(
        **{
            "estimator": "grpo", "eps_clip": 0.2, "eps_clip_high": options.get("eps_clip", 0.2), "eps_clip_c": None,
            "entropy_coef": 0.0, "use_kl_loss": False, "kl_loss_coef": 0.0, "kl_loss_type": "k1",
            "use_unbiased_kl": False, "use_tis": False, "tis_clip": 2.0, "tis_clip_low": 0.0,
            "calculate_per_token_loss": False, "on_policy": False,
        } | options
    )  # fmt: skip
    trained = [s.mask & (not s.removed) for s in batch]
    rollout_ids = {s.rollout_id for s in batch}
    totals = dict.fromkeys(["sft", "pg_loss", "pg_clipfrac", "ppo_kl", "entropy_loss", "kl_loss"], 0.0)
    totals |= dict.fromkeys(["ois", "tis", "tis_clipfrac", "tis_abs"], 0.0)
    for sample, mask in zip(batch, trained, strict=True):
        tokens = sum(m.sum() for s, m in zip(batch, trained, strict=True) if s.rollout_id == sample.rollout_id)
        if o.calculate_per_token_loss:
            weight = 1 / sum(m.sum() for m in trained)
        else:
            weight = 1 / max(1, tokens) / len(rollout_ids)
        old = sample.policy if o.on_policy else sample.old
        for t in np.flatnonzero(mask):
            log_ratio = token_log_ratio = sample.policy[t] - old[t]
            if o.estimator == "gspo":
                log_ratio = np.mean((sample.policy - old)[mask])
            ratio, advantage = np.exp(log_ratio), sample.advantage
            clipped_ratio = min(max(ratio, 1 - o.eps_clip), 1 + o.eps_clip_high)
            pg = -min(ratio * advantage, clipped_ratio * advantage)
            if o.eps_clip_c is not None and advantage < 0:
                pg = min(pg, -o.eps_clip_c * advantage)
            tis = np.exp(old[t] - sample.rollout[t])
            if o.use_tis:
                pg *= min(max(tis, o.tis_clip_low), o.tis_clip)
            d = sample.policy[t] - sample.ref[t]
            kl = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d, "low_var_kl": np.exp(-d) - 1 + d}[o.kl_loss_type]
            kl *= np.exp(token_log_ratio) if o.use_unbiased_kl else 1.0
            kl = min(max(kl, -10), 10) if o.kl_loss_type == "low_var_kl" else kl
            totals["sft"] -= weight * sample.policy[t]
            totals["pg_loss"] += weight * pg
            totals["pg_clipfrac"] += weight * (clipped_ratio * advantage < ratio * advantage)
            totals["ppo_kl"] -= weight * log_ratio
            totals["entropy_loss"] += weight * sample.entropy[t]
            totals["kl_loss"] += weight * kl
            totals["ois"] += weight * ratio
            totals["tis"] += weight * tis
            totals["tis_clipfrac"] += weight * (not o.tis_clip_low <= tis <= o.tis_clip)
            totals["tis_abs"] += weight * abs(tis - 1)
    totals["loss"] = totals["pg_loss"] - o.entropy_coef * totals["entropy_loss"]
    if o.use_kl_loss:
        totals["loss"] += o.kl_loss_coef * totals["kl_loss"]
    return totals


def micro_batch(
    samples: list[SampleData], weights: list[float], *, on_policy: bool, dtype: torch.dtype = torch.float32
) -> LossInputs:
    def rows(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([np.empty(0), *(getattr(s, name) for s in samples)])).to(dtype)

    mask = rows("mask").bool()
    sample_ids = torch.repeat_interleave(
        torch.arange(len(samples)), torch.tensor([len(s.mask) for s in samples], dtype=torch.long)
    )
    return LossInputs(
        policy_log_probs=rows("policy").requires_grad_(),
        old_log_probs=None if on_policy else rows("old"),
        rollout_log_probs=rows("rollout"),
        ref_log_probs=rows("ref"),
        entropy=rows("entropy").requires_grad_(),
        advantages=torch.tensor([s.advantage for s in samples], dtype=dtype)[sample_ids],
        loss_mask=mask,
        loss_weights=token_loss_weights(torch.tensor(weights, dtype=dtype), sample_ids, mask),
        sample_ids=sample_ids,
    )


def global_weights(batch: list[SampleData], calculate_per_token_loss: bool) -> list[float]:
    return sample_loss_weights(
        [int(s.mask.sum()) for s in batch],
        [s.rollout_id for s in batch],
        removed=[s.removed for s in batch],
        calculate_per_token_loss=calculate_per_token_loss,
    )


def random_splits(num_samples: int, seed: int) -> list[list[int]]:
    """Samples in random order, in random micro-batches, some of them empty."""
    random = np.random.default_rng(seed)
    borders = np.sort(random.integers(0, num_samples + 1, random.integers(0, num_samples)))
    return [part.tolist() for part in np.split(random.permutation(num_samples), borders)]


def run(loss: Loss, batch: list[SampleData], splits: list[list[int]], *, on_policy: bool, per_token: bool) -> Any:
    """Metrics added over micro-batches, and the gradients by sample."""
    weights = global_weights(batch, per_token)
    metrics: dict[str, float] = {}
    gradients: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for split in splits:
        inputs = micro_batch([batch[i] for i in split], [weights[i] for i in split], on_policy=on_policy)
        output = loss(inputs)
        output.loss.backward()
        for name, value in {"loss": output.loss, **output.metrics}.items():
            assert not output.metrics[name].requires_grad
            metrics[name] = metrics.get(name, 0.0) + value.item()
        entropy_grad = inputs.entropy.grad if inputs.entropy.grad is not None else torch.zeros_like(inputs.entropy)
        borders = np.cumsum([len(batch[i].mask) for i in split])[:-1]
        parts = zip(
            np.split(inputs.policy_log_probs.grad.numpy(), borders),
            np.split(entropy_grad.numpy(), borders),
            strict=True,
        )
        gradients |= dict(zip(split, parts, strict=False))
    return metrics, gradients


ESTIMATORS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "grpo on policy": {"on_policy": True},
    "grpo per token": {"calculate_per_token_loss": True},
    "grpo clip high": {"eps_clip": 0.1, "eps_clip_high": 0.28},
    "grpo dual clip": {"eps_clip_c": 1.3},
    "grpo entropy": {"entropy_coef": 0.05},
    "grpo kl as a metric": {"use_kl_loss": True, "kl_loss_type": "low_var_kl"},
    **{
        f"grpo {kl}{' unbiased' * unbiased}": {
            "use_kl_loss": True, "kl_loss_coef": 0.3, "kl_loss_type": kl, "use_unbiased_kl": unbiased,
        }
        for kl in ("k1", "k2", "k3", "low_var_kl")
        for unbiased in (False, True)
    },
    "grpo tis": {"use_tis": True, "tis_clip": 1.2, "tis_clip_low": 0.8},
    "gspo": {"estimator": "gspo", "eps_clip": 0.03},
    "gspo on policy": {"estimator": "gspo", "on_policy": True},
    "gspo per token": {"estimator": "gspo", "eps_clip": 0.03, "calculate_per_token_loss": True},
    "gspo everything": {
        "estimator": "gspo", "eps_clip": 0.03, "eps_clip_high": 0.05, "eps_clip_c": 1.1, "entropy_coef": 0.01,
        "use_kl_loss": True, "kl_loss_coef": 0.3, "kl_loss_type": "k3", "use_unbiased_kl": True, "use_tis": True,
    },
}  # fmt: skip


def policy_loss(options: dict[str, Any]) -> Loss:
    names = {name: value for name, value in options.items() if name not in ("estimator", "on_policy")}
    names.pop("calculate_per_token_loss", None)
    return make_policy_loss(options.get("estimator", "grpo"), **names)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_loss_does_not_depend_on_how_the_batch_is_split(name: str) -> None:
    """Whole, sample by sample, and at random: equal to the float64 loops to 1e-6 in fp32, gradients to each other."""
    options = ESTIMATORS[name]
    on_policy, per_token = options.get("on_policy", False), options.get("calculate_per_token_loss", False)
    for seed in range(3):
        batch = global_batch(seed)
        expected = reference(batch, **options)
        whole = [list(range(len(batch)))]
        _, gradients = run(policy_loss(options), batch, whole, on_policy=on_policy, per_token=per_token)
        for splits in [whole, [[i] for i in range(len(batch))], *(random_splits(len(batch), s) for s in range(4))]:
            metrics, other = run(policy_loss(options), batch, splits, on_policy=on_policy, per_token=per_token)
            for metric, value in metrics.items():
                assert value == pytest.approx(expected[metric], rel=1e-6, abs=1e-6), metric
            for i, (policy_grad, entropy_grad) in gradients.items():
                np.testing.assert_allclose(other[i][0], policy_grad, rtol=1e-6, atol=1e-7)
                np.testing.assert_allclose(other[i][1], entropy_grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_gradient_is_that_of_the_reference(name: str) -> None:
    """Against central differences of the float64 loops; a removed sample's gradient is 0."""
    options = ESTIMATORS[name]
    batch, step = global_batch(seed=5), 1e-6
    frozen = {**options, "on_policy": False}
    if options.get("on_policy"):
        for sample in batch:
            sample.old = sample.policy.copy()
    weights = global_weights(batch, options.get("calculate_per_token_loss", False))
    inputs = micro_batch(batch, weights, on_policy=options.get("on_policy", False), dtype=torch.float64)
    policy_loss(options)(inputs).loss.backward()
    actual = np.split(inputs.policy_log_probs.grad.numpy(), np.cumsum([len(s.mask) for s in batch])[:-1])
    for i in (0, 2, 4, 7, len(batch) - 1):
        for t in range(len(batch[i].mask)):
            sides = []
            for sign in (1, -1):
                batch[i].policy[t] += sign * step
                sides.append(reference(batch, **frozen)["loss"])
                batch[i].policy[t] -= sign * step
            assert actual[i][t] == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-5, abs=1e-8)
    assert not actual[2].any()


def test_metrics_are_those_that_slime_reports() -> None:
    inputs = micro_batch(global_batch(0), global_weights(global_batch(0), False), on_policy=False)
    basic = {"loss", "pg_loss", "pg_clipfrac", "ppo_kl", "entropy_loss"}
    tis = {"ois", "tis", "tis_clipfrac", "tis_abs"}
    assert make_policy_loss("grpo")(inputs).metrics.keys() == basic
    assert make_policy_loss("gspo", use_kl_loss=True)(inputs).metrics.keys() == basic | {"kl_loss"}
    assert make_policy_loss("grpo", use_tis=True)(inputs).metrics.keys() == basic | tis
    assert SftLoss()(inputs).metrics.keys() == {"loss"}


def test_mismatch_metrics_alone_leave_the_loss_as_it_is() -> None:
    inputs = micro_batch(global_batch(0), global_weights(global_batch(0), False), on_policy=False)
    plain, measured = make_policy_loss("grpo")(inputs), make_policy_loss("grpo", get_mismatch_metrics=True)(inputs)
    assert measured.loss == plain.loss
    assert measured.metrics["tis"] == make_policy_loss("grpo", use_tis=True)(inputs).metrics["tis"]


@pytest.mark.parametrize("per_token", [False, True])
def test_sft_is_the_mean_negative_log_likelihood_however_the_batch_is_split(per_token: bool) -> None:
    batch = global_batch(1)
    expected = reference(batch, calculate_per_token_loss=per_token)["sft"]
    for splits in [[list(range(len(batch)))], *(random_splits(len(batch), s) for s in range(4))]:
        metrics, gradients = run(SftLoss(), batch, splits, on_policy=True, per_token=per_token)
        assert metrics["loss"] == pytest.approx(expected, rel=1e-6)
        for i, weight in enumerate(global_weights(batch, per_token)):
            np.testing.assert_allclose(gradients[i][0], -weight * batch[i].mask, rtol=1e-6)


def test_on_policy_gradient_is_reinforce() -> None:
    """At ratio 1, d loss / d log-prob is -advantage * weight, for tokens and, summed over a sample, for sequences."""
    batch = global_batch(3)
    weights = global_weights(batch, False)
    for estimator in ("grpo", "gspo"):
        inputs = micro_batch(batch, weights, on_policy=True)
        make_policy_loss(estimator)(inputs).loss.backward()
        expected = -(inputs.advantages * inputs.loss_weights)
        torch.testing.assert_close(inputs.policy_log_probs.grad, expected)


def test_clipping_by_hand() -> None:
    """Ratio 2 is outside [0.8, 1.3]: a gain is cut at 1.3, a loss is kept, or cut at 1.5 by dual clip."""
    ratio, advantages = torch.tensor([2.0, 2.0, 0.5, 0.5]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, is_clipped = clipped_policy_loss(ratio, advantages, eps_clip=0.2, eps_clip_high=0.3)
    torch.testing.assert_close(loss, torch.tensor([-1.3, 2.0, -0.5, 0.8]))
    assert is_clipped.tolist() == [True, False, False, True]
    loss, _ = clipped_policy_loss(ratio, advantages, eps_clip=0.2, eps_clip_high=0.3, eps_clip_c=1.5)
    torch.testing.assert_close(loss, torch.tensor([-1.3, 1.5, -0.5, 0.8]))


def test_a_sequence_is_clipped_as_a_whole() -> None:
    """Token ratios e^0.3 and e^-0.3: GRPO clips one of them, GSPO's ratio is 1."""
    batch = [SampleData(0, 1.0, np.array([True, True]), *np.zeros((5, 2)))]
    batch[0].policy = np.array([0.3, -0.3])
    inputs = micro_batch(batch, [0.5], on_policy=False)
    assert make_policy_loss("grpo")(inputs).metrics["pg_clipfrac"] == 0.5
    gspo = make_policy_loss("gspo")(inputs)
    assert gspo.metrics["pg_clipfrac"] == 0
    assert gspo.loss.item() == pytest.approx(-1.0)


@pytest.mark.parametrize("estimator", ["grpo", "gspo"])
@pytest.mark.parametrize("odd", [float("nan"), float("-inf"), 1e6])
def test_whatever_stands_at_masked_tokens_reaches_neither_loss_nor_gradient(estimator: str, odd: float) -> None:
    batch = global_batch(0)
    loss = make_policy_loss(
        estimator, use_kl_loss=True, kl_loss_coef=0.1, kl_loss_type="k3", use_unbiased_kl=True, use_tis=True,
        entropy_coef=0.1,
    )  # fmt: skip
    splits = [list(range(len(batch)))]
    expected, expected_gradients = run(loss, batch, splits, on_policy=False, per_token=False)
    for sample in batch:
        for values in (sample.old, sample.rollout, sample.ref, sample.entropy):
            values[~sample.mask | sample.removed] = odd
    metrics, gradients = run(loss, batch, splits, on_policy=False, per_token=False)
    assert metrics == expected
    for i in range(len(batch)):
        np.testing.assert_array_equal(gradients[i], expected_gradients[i])


def test_a_ratio_beyond_fp32_that_is_clipped_has_gradient_zero() -> None:
    batch = [SampleData(0, 1.0, np.array([True]), *np.zeros((5, 1)))]
    batch[0].old[:] = -100.0
    inputs = micro_batch(batch, [1.0], on_policy=False)
    output = make_policy_loss("grpo")(inputs)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(-1.2)
    assert inputs.policy_log_probs.grad.item() == 0


def test_an_empty_micro_batch_contributes_zero_and_can_be_differentiated() -> None:
    inputs = micro_batch([], [], on_policy=False)
    for loss in (make_policy_loss("gspo", use_kl_loss=True, use_tis=True, entropy_coef=0.1), SftLoss()):
        output = loss(inputs)
        output.loss.backward()
        assert {value.item() for value in output.metrics.values()} == {0.0}


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({}, "advantages"),
        ({"use_tis": True}, "rollout_log_probs"),
        ({"use_kl_loss": True}, "ref_log_probs"),
        ({"entropy_coef": 0.1}, "entropy"),
    ],
)
def test_a_missing_tensor_is_named(options: dict[str, Any], missing: str) -> None:
    inputs = micro_batch(global_batch(0), global_weights(global_batch(0), False), on_policy=False)
    without = LossInputs(**{**vars(inputs), missing: None})
    with pytest.raises(ValueError, match=rf"LossInputs\.{missing} is None"):
        make_policy_loss("grpo", **options)(without)


@pytest.mark.parametrize(
    ("estimator", "options", "field"),
    [
        ("ppo", {}, "--advantage-estimator is 'ppo'"),
        ("grpo", {"kl_loss_type": "k4"}, "--kl-loss-type is 'k4'"),
        ("grpo", {"eps_clip_c": 1.0}, "--eps-clip-c is 1.0"),
        ("grpo", {"tis_clip_low": 3.0}, "--tis-clip-low is 3.0"),
    ],
)
def test_impossible_options_are_refused(estimator: str, options: dict[str, Any], field: str) -> None:
    with pytest.raises(OptionError, match=field):
        make_policy_loss(estimator, **options)


def test_options_reach_the_loss() -> None:
    options = {
        "advantage_estimator": "gspo", "eps_clip": 0.3, "eps_clip_high": 0.4, "eps_clip_c": 5.0, "entropy_coef": 0.1,
        "use_kl_loss": True, "kl_loss_coef": 0.2, "kl_loss_type": "k2", "use_unbiased_kl": True, "use_tis": True,
        "get_mismatch_metrics": True, "tis_clip": 3.0, "tis_clip_low": 0.5,
    }  # fmt: skip
    built = loss_from_options(AlgorithmOptions(loss_type="policy_loss", **options))
    assert built == make_policy_loss(**options)
    assert vars(built) == {"sequence_level": True, **{k: v for k, v in options.items() if k != "advantage_estimator"}}
    assert loss_from_options(AlgorithmOptions(loss_type="sft_loss", eps_clip=0.3, use_tis=True)) == SftLoss()
