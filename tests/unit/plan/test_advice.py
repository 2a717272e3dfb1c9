"""What is suggested fits, is as small as it can be, and is said in flags that can be pasted."""

from __future__ import annotations

import re
import shlex
from itertools import combinations
from typing import Any

import pytest
from plan_cases import EIGHT_H100, GRPO, ONE_GPU, ONE_H200, SHAPES, config

from lockstep.config.config import Config
from lockstep.config.parsing import parse_options
from lockstep.models import ModelConfig, read_model_config
from lockstep.plan import Hardware, predict
from lockstep.plan.advice import Change, better_hardware, can_drop_offload, choices_of, smallest_change, with_changes

EIGHT_RANKS = {"actor_num_gpus_per_node": 8, "expert_model_parallel_size": 8}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "30B on one H200": ("30B-A3B", ONE_H200, {}),
    "4B on one H100": ("4B", "1xH100-80G,128G-host", {}),
    "Next on eight H100": ("Next-80B-A3B", EIGHT_H100, EIGHT_RANKS),
    "Next with micro-batches of just one sample": (
        "Next-80B-A3B",
        EIGHT_H100,
        EIGHT_RANKS | {"max_tokens_per_gpu": 8192, "recompute_granularity": "full"},
    ),
    "30B with seven GPUs idle": ("30B-A3B", EIGHT_H100, {}),
    "30B with little on the host": ("30B-A3B", ONE_H200, ONE_GPU | {"optimizer_offload_fraction": 0.5}),
    "30B with all on the host": (
        "30B-A3B",
        "1xH200-141G,114G-host",
        ONE_GPU | {"optimizer_offload_fraction": 1.0},
    ),
    "4B with too much KV cache": ("4B", ONE_H200, {"rollout_max_tokens": 10**6, "recompute_granularity": "full"}),
}


def words(options: dict[str, Any]) -> list[str]:
    flags = [f"--{name.replace('_', '-')}" for name in options]
    return [
        word
        for flag, value in zip(flags, options.values(), strict=True)
        for word in ([flag] if value is True else [flag, str(value)])
    ]


def case(name: str) -> tuple[dict[str, Any], Config, ModelConfig, Hardware]:
    shape, hardware, changes = CASES[name]
    options = GRPO | changes
    return options, config(options), read_model_config(SHAPES[shape]), Hardware.parse(hardware)


@pytest.mark.parametrize("name", CASES)
def test_the_suggested_flags_make_the_run_fit(name: str) -> None:
    options, before, model, hardware = case(name)
    assert not predict(before, model, hardware).fits
    changes = smallest_change(before, model, hardware, samples=True)
    flags = shlex.split(" ".join(change.flags for change in changes))
    after = parse_options("plan", [*words(options), *flags]).config
    assert predict(after, model, hardware).fits
    assert after == with_changes(before, changes)


@pytest.mark.parametrize("name", CASES)
def test_no_part_of_the_suggestion_is_enough(name: str) -> None:
    _, before, model, hardware = case(name)
    changes = smallest_change(before, model, hardware, samples=True)
    for count in range(len(changes)):
        for part in combinations(changes, count):
            assert not predict(with_changes(before, part), model, hardware).fits


def test_speed_is_given_before_accuracy() -> None:
    """Both recomputing and 8-bit moments would make room enough here."""
    _, before, model, hardware = case("4B on one H100")
    assert [change.flags for change in smallest_change(before, model, hardware, samples=True)] == [
        "--recompute-granularity full"
    ]


def test_recomputing_is_not_suggested_to_who_recomputes() -> None:
    """By layer, activations are recomputed anyway."""
    model = read_model_config(SHAPES["30B-A3B"])
    before, hardware = config(ONE_GPU, optimizer_cpu_offload=False), Hardware.parse(ONE_H200)
    changes = smallest_change(before, model, hardware, samples=True)
    assert [change.options[0][0] for change in changes] == ["optimizer_cpu_offload"]
    assert not any(
        change.options[0][0] == "recompute_granularity"
        for choice in choices_of(before, model, hardware)
        for change in choice
    )


def test_idle_gpus_are_used_first() -> None:
    _, before, model, hardware = case("30B with seven GPUs idle")
    changes = smallest_change(before, model, hardware, samples=True)
    assert changes[0].flags == "--actor-num-gpus-per-node 8 --expert-model-parallel-size 8"


@pytest.mark.parametrize("name", ["30B with little on the host", "30B with all on the host"])
def test_the_share_of_offloaded_state_is_found(name: str) -> None:
    """Half of the state is too much for the GPU, all of it for the host."""
    _, before, model, hardware = case(name)
    changes = smallest_change(before, model, hardware, samples=True)
    assert [change.flags for change in changes] == ["--optimizer-offload-fraction 0.9"]


def test_where_nothing_fits_other_hardware_is_named() -> None:
    """bf16 weights and gradients of 235 billion parameters are 940 GB, more than eight of these GPUs have."""
    model = read_model_config(SHAPES["235B-A22B"])

    def changes_on(count: int) -> tuple[Change, ...]:
        ranks = config(GRPO, actor_num_gpus_per_node=count, expert_model_parallel_size=count)
        hardware = Hardware.parse(f"{count}xH100-80G,{count * 256}G-host")
        return smallest_change(ranks, model, hardware, samples=True)

    hint = better_hardware(config(GRPO, **EIGHT_RANKS), model, Hardware.parse(EIGHT_H100), samples=True)
    named = re.search(r"The next better hardware: (\d+) GPUs of this kind", hint)
    assert named is not None
    assert changes_on(8) == ()
    assert changes_on(int(named[1]) // 2) == ()
    assert changes_on(int(named[1])) != ()


def test_offload_may_be_dropped_where_the_state_fits() -> None:
    model = read_model_config(SHAPES["4B"])
    roomy, tight = Hardware.parse(ONE_H200), Hardware.parse("1xA-48G,128G-host")
    offloaded = config(GRPO, optimizer_cpu_offload=True, recompute_granularity="full", rollout_max_tokens=16384)
    assert can_drop_offload(offloaded, model, predict(offloaded, model, roomy), samples=True)
    assert not can_drop_offload(offloaded, model, predict(offloaded, model, tight), samples=True)


def test_offload_may_be_dropped_where_more_nodes_share_the_state() -> None:
    """12 bytes for each of 30 billion parameters are 46 GB on each of 8 GPUs, and 11 GB on each of 32."""
    model, hardware = read_model_config(SHAPES["30B-A3B"]), Hardware.parse("8xA-64G,2T-host")

    def may(num_nodes: int) -> bool:
        changes = {**EIGHT_RANKS, "optimizer_cpu_offload": True, "recompute_granularity": "full"}
        offloaded = config(GRPO, **changes, actor_num_nodes=num_nodes, rollout_max_tokens=16384)
        prediction = predict(offloaded, model, hardware, samples=True)
        assert prediction.fits
        return can_drop_offload(offloaded, model, prediction, samples=True)

    assert [may(1), may(4)] == [False, True]


def test_the_30b_fits_one_gpu_as_it_was_measured() -> None:
    model = read_model_config(SHAPES["30B-A3B"])
    assert predict(config(ONE_GPU), model, Hardware.parse(ONE_H200), samples=False).fits
