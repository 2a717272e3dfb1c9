"""Metrics are declared once, and those about samples have the values a naive count gives."""

from __future__ import annotations

import itertools
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from lockstep import metrics
from lockstep.rewards import FAILURES
from lockstep.types import Sample

ARGS = SimpleNamespace(
    reward_key=None,
    advantage_estimator="grpo",
    log_passrate=False,
    log_reward_category=None,
    log_multi_turn=False,
    rollout_max_response_len=8,
    n_samples_per_eval_prompt=1,
)


def args(**changes):
    return SimpleNamespace(**{**vars(ARGS), **changes})


def sample(reward, *, group_index=0, length=4, prompt_length=2, **fields):
    return Sample(
        group_index=group_index,
        tokens=list(range(prompt_length + length)),
        response_length=length,
        reward=reward,
        status=fields.pop("status", Sample.Status.COMPLETED),
        **fields,
    )


# ---- declarations


def test_no_two_declarations_share_a_name():
    names = [metric.name for metric in metrics.METRICS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "declaration"),
    [
        ("train/grad_norm", "train/grad_norm"),
        ("train/lr-pg_0", "train/lr-pg_{group}"),
        ("rollout/response_len/median", "rollout/response_len/{mean,median,max,min}"),
        ("rollout/zero_std/count_-0.5", "rollout/zero_std/count_{reward}"),
        ("rollout/dynamic_filter/drop_zero_std_1.0", "rollout/dynamic_filter/drop_{reason}"),
        ("eval/step", "eval/step"),
        ("eval/aime-2024", "eval/{name}"),
        ("eval/aime-2024-truncated_ratio", "eval/{name}-truncated_ratio"),
        ("eval/aime-2024-pass@8", "eval/{name}-pass@{k}"),
        ("eval/aime-2024/response_len/mean", "eval/{name}/response_len/{mean,median,max,min}"),
        ("rollout/response_len/p99", None),
        ("train/grad_norms", None),
        ("eval/", None),
        ("grad_norm", None),
    ],
)
def test_a_name_is_found_under_its_most_specific_declaration(name, declaration):
    found = metrics.find(name)
    assert (found.name if found else None) == declaration


def test_an_undeclared_name_of_ours_is_refused_by_name():
    metrics.check(["train/loss", "eval/sums"])
    with pytest.raises(AssertionError, match=r"\['train/los'\]: add them to lockstep/metrics.py"):
        metrics.check(["train/loss", "train/los"])


# fmt: off
SLIME_NAMES = [
    "train/loss", "train/pg_loss", "train/entropy_loss", "train/pg_clipfrac", "train/ppo_kl", "train/kl_loss",
    "train/ois", "train/tis", "train/tis_clipfrac", "train/tis_abs", "train/train_rollout_logprob_abs_diff",
    "train/grad_norm", "train/lr-pg_0", "train/global_batch_size", "train/step", "rollout/raw_reward",
    "rollout/rewards", "rollout/returns", "rollout/advantages", "rollout/log_probs", "rollout/ref_log_probs",
    "rollout/rollout_log_probs", "rollout/total_lengths", "rollout/truncated_ratio", "rollout/repetition_frac",
    "rollout/prefix_cache_hit_rate", "rollout/avg_cached_tokens_per_sample", "rollout/top_p_kept_vocab_per_token",
    "rollout/step", "perf/rollout_time", "perf/tokens_per_gpu_per_sec", "perf/effective_tokens_per_gpu_per_sec",
    "perf/longest_sample_tokens_per_sec", "perf/train_wait_time", "perf/train_time", "perf/actor_train_time",
    "perf/log_probs_time", "perf/ref_log_probs_time",
    "perf/save_model_time", "perf/actor_train_tok_per_s",
    "perf/step_time", "perf/wait_time_ratio", "passrate/pass@4",
]
# fmt: on


def test_names_that_slime_users_know_are_declared_as_slime_s():
    metrics.check(SLIME_NAMES)
    assert [name for name in SLIME_NAMES if metrics.find(name).ours] == []


def test_every_declared_metric_is_written_by_something():
    """The page promises what a run writes, so a name that no code holds is a false promise."""
    package = Path(metrics.__file__).parent
    written = Path(metrics.__file__).read_text(encoding="utf-8").partition("\nMETRICS = ")[2]
    readers = {package / "metrics.py", *package.glob("report/*"), *package.glob("tracking/*")}
    written += "".join(path.read_text(encoding="utf-8") for path in package.rglob("*.py") if path not in readers)
    fixed = {metric.name: max(re.split(r"\{.*?\}|/", metric.name), key=len) for metric in metrics.METRICS}
    put_together = {"eval/{name}-pass@{k}", *(f"rollout/reward_{outcome}" for outcome in FAILURES)}
    assert {name for name, text in fixed.items() if text not in written} <= put_together


def test_the_docs_page_is_what_the_declarations_say():
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert page.read_text(encoding="utf-8") == metrics.as_markdown(), (
        "run: python -m lockstep.metrics > docs/metrics.md"
    )


def test_every_row_of_the_docs_page_has_four_columns():
    rows = [line for line in metrics.as_markdown().splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {5}


# ---- pass@k


@pytest.mark.parametrize(("num_samples", "num_correct", "k"), [(8, 3, 1), (8, 3, 4), (5, 0, 2), (5, 5, 2), (6, 4, 3)])
def test_pass_at_k_is_the_share_of_draws_with_a_correct_response(num_samples, num_correct, k):
    responses = [position < num_correct for position in range(num_samples)]
    draws = list(itertools.combinations(responses, k))
    assert metrics.pass_at_k(num_samples, num_correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_of_fewer_than_k_samples_is_not_defined():
    with pytest.raises(ValueError, match="pass@4 of 1 correct in 3"):
        metrics.pass_at_k(3, 1, 4)


def test_pass_rates_average_each_k_over_the_groups_that_are_large_enough():
    rewards = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, None, 0.5]
    rates = metrics.pass_rates(rewards, [7] * 4 + [8] * 2 + [9] * 2)
    assert rates == pytest.approx({"pass@1": (0.25 + 1.0 + 0.0) / 3, "pass@2": (0.5 + 1.0 + 0.0) / 3, "pass@4": 1.0})


def test_groups_of_one_have_no_pass_rates():
    assert metrics.pass_rates([1.0, 0.0], [0, 1]) == {}


# ---- rollout


def test_rollout_metrics_of_a_hand_worked_batch():
    groups = [
        [sample(1.0, length=2), sample(0.0, length=6, status=Sample.Status.TRUNCATED)],
        [
            sample(1.0, group_index=1, length=4, loss_mask=[1, 0, 0, 1], rollout_log_probs=[-1.0, -9.0, -9.0, -3.0]),
            sample(1.0, group_index=1, length=1, rollout_log_probs=[-0.5]),
        ],
    ]
    result = metrics.rollout_metrics(groups, args())
    assert result == pytest.approx(
        {
            "rollout/samples": 4,
            "rollout/response_tokens": 13,
            "rollout/raw_reward": 0.75,
            "rollout/response_len/mean": (2 + 6 + 2 + 1) / 4,
            "rollout/response_len/median": 2,
            "rollout/response_len/max": 6,
            "rollout/response_len/min": 1,
            "rollout/truncated_ratio": 0.25,
            "rollout/repetition_frac": 0,
            "rollout/zero_std/count_1.0": 1,
            "rollout/total_lengths": (13 + 4 * 2) / 4,
            "rollout/rollout_log_probs": ((-1.0 - 3.0) / 2 - 0.5) / 2,
        }
    )
    metrics.check(result)


def test_a_missing_reward_counts_neither_in_the_mean_nor_as_a_flat_group():
    result = metrics.rollout_metrics([[sample(0.5), sample(None)], [sample(None, group_index=1)]], args())
    assert result["rollout/raw_reward"] == 0.5
    assert result["rollout/zero_std/count_0.5"] == 1
    assert sum(name.startswith("rollout/zero_std") for name in result) == 1


def test_the_reward_key_picks_the_scalar_and_the_category_is_counted():
    group = [sample({"score": 1.0, "kind": "right"}), sample({"score": -1.0, "kind": "no answer"})]
    result = metrics.rollout_metrics([group], args(reward_key="score", log_reward_category="kind"))
    assert result["rollout/raw_reward"] == 0.0
    assert result["rollout/error_cat/right"] == result["rollout/error_cat/no answer"] == 0.5
    metrics.check(result)


def test_the_kept_nucleus_is_averaged_over_tokens_not_samples():
    group = [
        sample(1.0, length=1, rollout_top_p_token_ids=[5, 6], rollout_top_p_token_offsets=[0, 2]),
        sample(0.0, length=3, rollout_top_p_token_ids=list(range(10)), rollout_top_p_token_offsets=[0, 1, 4, 10]),
        sample(0.0, length=3),
    ]
    assert metrics.rollout_metrics([group], args())["rollout/top_p_kept_vocab_per_token"] == 12 / 4


def test_pass_rates_of_a_rollout_are_logged_on_request():
    group = [sample(1.0), sample(0.0)]
    assert metrics.rollout_metrics([group], args(log_passrate=True))["passrate/pass@1"] == 0.5
    assert "passrate/pass@1" not in metrics.rollout_metrics([group], args())


def test_an_empty_rollout_is_zero_samples_and_no_statistics():
    result = metrics.rollout_metrics([], args())
    assert result["rollout/samples"] == 0
    assert "rollout/response_len/mean" not in result
    assert all(math.isfinite(value) for value in result.values())


def test_only_long_texts_that_repeat_count_as_repetition():
    letters = random.Random(0)
    varied = "".join(letters.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(20_000))
    assert metrics.has_repetition("again " * 2_000)
    assert metrics.has_repetition(varied + "again " * 2_000), "only the last 10,000 characters are looked at"
    assert not metrics.has_repetition("again " * 1_000), "6,000 characters are too short to judge"
    assert not metrics.has_repetition(varied)


def test_token_means_give_every_sample_one_vote():
    values, masks = [[1.0, 2.0, 3.0], [10.0], [5.0, 5.0]], [[1, 1, 1], [1], [0, 0]]
    assert metrics.token_mean_per_sample(values, masks) == (2.0 + 10.0) / 2


def test_throughput_is_tokens_over_rollout_time_and_gpus():
    groups = [[sample(1.0, length=30), sample(0.0, length=10, loss_mask=[1] * 4 + [0] * 6, non_generation_time=2.0)]]
    result = metrics.rollout_perf_metrics(groups, rollout_time=4.0, num_gpus=2)
    assert result["perf/tokens_per_gpu_per_sec"] == 40 / 4 / 2
    assert result["perf/effective_tokens_per_gpu_per_sec"] == 34 / 4 / 2
    assert result["perf/longest_sample_tokens_per_sec"] == 30 / 4
    assert result["perf/non_generation_time/mean"] == 1.0
    metrics.check(result)


# ---- evaluation


def test_eval_metrics_of_two_sets():
    samples = [sample(1.0, group_index=g, length=2 + g) for g in (0, 0, 1, 1)]
    data = {
        "sums": {"rewards": [1.0, 0.0, 0.0, 0.0], "truncated": [False, True, False, False], "samples": samples},
        "products": {"rewards": [1.0, 1.0]},
    }
    result = metrics.eval_metrics(data, args(log_passrate=True, n_samples_per_eval_prompt=2))
    assert result["eval/sums"] == 0.25
    assert result["eval/sums-truncated_ratio"] == 0.25
    assert result["eval/sums/response_len/mean"] == 2.5
    assert result["eval/sums/zero_std/count_0.0"] == 1, "the set's own rewards are used, not the samples'"
    assert (result["eval/sums-pass@1"], result["eval/sums-pass@2"]) == (0.25, 0.5)
    assert (result["eval/products"], result["eval/products-pass@2"]) == (1.0, 1.0)
    metrics.check(result)


# ---- --log-multi-turn and --log-correct-samples


def test_turns_are_measured_with_and_without_the_tools_tokens():
    samples = [
        sample(1.0, length=4, loss_mask=[1, 0, 0, 1], metadata={"round_number": 3}),
        sample(0.0, length=8, metadata={"round_number": 1}),
    ]
    of_turns = {
        name.removeprefix("multi_turn/"): value
        for name, value in metrics.rollout_metrics([samples], args(log_multi_turn=True)).items()
        if name.startswith("multi_turn/")
    }
    assert of_turns == {
        "raw_response_length/response_length_mean": 6.0,
        "raw_response_length/response_length_max": 8.0,
        "raw_response_length/response_length_min": 4.0,
        "raw_response_length/response_length_clip_ratio": 0.5,
        "wo_obs_response_length/response_length_mean": 5.0,
        "wo_obs_response_length/response_length_max": 8.0,
        "wo_obs_response_length/response_length_min": 2.0,
        "multi_turn_metric/round_number_mean": 2.0,
        "multi_turn_metric/round_number_max": 3.0,
        "multi_turn_metric/round_number_min": 1.0,
    }
    metrics.check(f"multi_turn/{name}" for name in of_turns)


def test_turns_are_not_counted_unless_a_generate_function_counts_them():
    found = metrics.rollout_metrics([[sample(1.0)]], args(log_multi_turn=True))
    assert [name for name in found if "round_number" in name] == []
    assert [name for name in metrics.rollout_metrics([[sample(1.0)]], args()) if "multi_turn" in name] == []


def test_correct_samples_are_measured_apart():
    samples = [
        sample(1.0, length=1),
        sample(1.0, length=2, loss_mask=[0, 1]),
        sample(0.5, length=8),
        sample(1.0, length=5),
        sample(1.0, length=12),
    ]
    log_probs = [[-1.0], [-9.0, -2.0], [-7.0] * 8, [-3.0] * 5, [-6.0] * 12]
    found = metrics.correct_sample_metrics(samples, log_probs, args(rollout_max_response_len=8))
    assert found == {
        "rollout/correct_response_lengths": 5.0,
        "rollout/correct_entropy": 3.0,
        "rollout/correct_length/p25": 0.5,
        "rollout/correct_length/p50": 0.0,
        "rollout/correct_length/p75": 0.25,
        "rollout/correct_length/p100": 0.25,
    }
    metrics.check(found)
    assert metrics.correct_sample_metrics(samples[2:3], log_probs[2:3], args()) == {}
