"""The smallest change of options with which a run fits, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

from lockstep.config import Config, OptimizerOptions
from lockstep.config.config import HOME
from lockstep.config.reporting import flag_of
from lockstep.models import ModelConfig
from lockstep.plan.batches import longest_context
from lockstep.plan.hardware import GIB, Hardware
from lockstep.plan.predict import Prediction, predict

_MOST_GPUS = 64

_FRACTIONS = (0.25, 0.5, 0.75, 0.9, 1.0)
"""Shares of the optimizer's state that may be offloaded."""

_TRADES = ("recompute_granularity", "optimizer_cpu_offload", "optimizer_offload_fraction")
"""First options of choices that take one kind of memory where they save another."""


@dataclass(frozen=True)
class Change:
    """Options to set, what that costs in words, and as a rank among changes: speed before accuracy."""

    options: tuple[tuple[str, Any], ...]
    costs: str
    rank: float

    @property
    def flags(self) -> str:
        return " ".join(flag_of(name) if value is True else f"{flag_of(name)} {value}" for name, value in self.options)


def with_changes(config: Config, changes: tuple[Change, ...]) -> Config:
    """The config with the options of all changes."""
    groups: dict[str, dict[str, Any]] = {}
    for change in changes:
        for name, value in change.options:
            groups.setdefault(HOME[name], {})[name] = value
    return config.model_copy(
        update={group: getattr(config, group).model_copy(update=values) for group, values in groups.items()}
    )


def smallest_change(config: Config, model: ModelConfig, hardware: Hardware, *, samples: bool) -> tuple[Change, ...]:
    """As few changes as possible that fit together, among those the cheapest; none where not even all fit."""
    choices = list(choices_of(config, model, hardware))
    if not any(predict(least, model, hardware, samples=samples).fits for least in _smallest(config, choices)):
        return ()
    for count in range(1, len(choices) + 1):
        bundles = [bundle for chosen in combinations(choices, count) for bundle in product(*chosen)]
        for bundle in sorted(bundles, key=lambda bundle: sum(change.rank for change in bundle)):
            if predict(with_changes(config, bundle), model, hardware, samples=samples).fits:
                return bundle
    return ()


def _smallest(config: Config, choices: list[list[Change]]) -> Iterator[Config]:
    """Every change made, and of each choice the one that saves most; of some, that depends on the rest."""
    for bundle in product(*(choice if choice[0].options[0][0] in _TRADES else choice[-1:] for choice in choices)):
        yield with_changes(config, bundle)


def choices_of(config: Config, model: ModelConfig, hardware: Hardware) -> Iterator[list[Change]]:
    """Lists of changes of which at most one can be made; the last one saves most."""
    batching, optimizer, rollout = config.batching, config.optimizer, config.rollout
    on_gpu, is_bf16 = hardware.num_gpus > 0, config.model.params_dtype == "bfloat16"
    num_ranks = config.cluster.actor_num_gpus_per_node
    if hardware.num_gpus > num_ranks:
        yield [_more_gpus(model, hardware.num_gpus)]
    longest = longest_context(config, model)
    if rollout.rollout_max_tokens is not None and rollout.rollout_max_tokens > longest:
        sizes = sorted({max(longest, rollout.rollout_max_tokens // part) for part in (2, 4, 8)}, reverse=True)
        why = "fewer samples are decoded at the same time"
        yield [Change((("rollout_max_tokens", size),), why, 1 - size / 10**9) for size in sizes]
    samples = -(-rollout.samples_per_rollout // num_ranks)
    if model.num_delta_layers and rollout.rollout_max_running_requests > samples:
        why = "a rank has no more samples at the same time"
        yield [Change((("rollout_max_running_requests", samples),), why, 0.1)]
    yield from _smaller_micro_batches(config, longest)
    if batching.backward_order != "layer" and batching.recompute_granularity != "full":
        why = "every layer is computed forward twice"
        orders = [("recompute_granularity", "full", 3.0), ("backward_order", "layer", 3.1)]
        has_stages = config.parallel.pipeline_model_parallel_size > 1
        allowed = orders[:1] if not on_gpu or has_stages or config.parallel.grad_reduce_in_bf16 else orders
        yield [Change(((name, value),), why, rank) for name, value, rank in allowed]
    if on_gpu:
        yield _offload(optimizer)
    precise = ("use_precision_aware_optimizer", True)
    if is_bf16 and optimizer.main_grads_dtype == "fp32":
        yield [Change((precise, ("main_grads_dtype", "bf16")), "gradients are rounded to bf16", 5)]
    if optimizer.exp_avg_dtype != "8bit" or optimizer.exp_avg_sq_dtype != "8bit":
        moments = (("exp_avg_dtype", "8bit"), ("exp_avg_sq_dtype", "8bit"))
        yield [Change((precise, *moments), "moments are rounded at random to 8 bits", 6)]


def _offload(optimizer: OptimizerOptions) -> list[Change]:
    why = "the update takes as long as the state's way over the link and back"
    if not optimizer.optimizer_cpu_offload:
        streamed = (("optimizer_cpu_offload", True), ("overlap_cpu_optimizer_d2h_h2d", True))
        return [Change((*streamed, ("optimizer_offload_fraction", f)), why, 2 + f) for f in _FRACTIONS]
    now = optimizer.optimizer_offload_fraction
    return [Change((("optimizer_offload_fraction", f),), why, 1 + f) for f in _FRACTIONS if f != now]


def _more_gpus(model: ModelConfig, count: int) -> Change:
    options: list[tuple[str, Any]] = [("actor_num_gpus_per_node", count)]
    if model.num_experts and model.num_experts % count == 0:
        options.append(("expert_model_parallel_size", count))
    return Change(tuple(options), "the machine's other GPUs", 0)


def _smaller_micro_batches(config: Config, longest: int) -> Iterator[list[Change]]:
    batching, why = config.batching, "smaller micro-batches use the GPU less well"
    if batching.use_dynamic_batch_size and batching.max_tokens_per_gpu is not None:
        now = batching.max_tokens_per_gpu
        sizes = [size for part in (2, 4, 8) if (size := now // part) >= longest] or [longest] * (now > longest)
        if sizes:
            yield [
                Change(
                    (("max_tokens_per_gpu", size), ("log_probs_max_tokens_per_gpu", size)), why, 1.5 + now / size / 10
                )
                for size in sizes
            ]
    elif batching.micro_batch_size > 1:
        half = batching.micro_batch_size // 2
        yield [Change((("micro_batch_size", size),), why, 1.5 + 1 / size) for size in sorted({1, half})]


def better_hardware(config: Config, model: ModelConfig, hardware: Hardware, *, samples: bool) -> str:
    """What hardware would do when no change of options does, in words."""
    choices = list(choices_of(config, model, hardware))
    found = [predict(least, model, hardware, samples=samples) for least in _smallest(config, choices)]
    needs = min(found, key=lambda needs: needs.missing_gpu_bytes + needs.missing_host_bytes)
    host = f"{needs.host_peak / GIB:,.0f} GiB of host memory"
    if not needs.num_gpus:
        return f"With every change that saves memory it needs {host}."
    text = f"With every change that saves memory it needs {needs.gpu_peak / GIB:,.0f} GiB of each GPU and {host}."
    count = max(2, 2 * hardware.num_gpus)
    while count <= _MOST_GPUS:
        larger = replace(hardware, num_gpus=count, host_bytes=hardware.host_bytes * count // hardware.num_gpus)
        more = with_changes(config, (_more_gpus(model, count),))
        choices = list(choices_of(more, model, larger))
        if any(predict(least, model, larger, samples=samples).fits for least in _smallest(more, choices)):
            return f"{text} The next better hardware: {count} GPUs of this kind, with as much host memory for each."
        count *= 2
    return text


def can_drop_offload(config: Config, model: ModelConfig, prediction: Prediction, *, samples: bool) -> bool:
    """Whether the optimizer's state would fit on the GPUs as well."""
    if not config.optimizer.optimizer_cpu_offload or not prediction.num_gpus:
        return False
    without = with_changes(config, (Change((("optimizer_cpu_offload", False),), "", 0),))
    return predict(without, model, prediction.hardware, samples=samples).fits
