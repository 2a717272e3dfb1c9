"""A plan as text: the batch arithmetic, bytes by item and phase, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lockstep.config import Config
from lockstep.plan.advice import Change
from lockstep.plan.hardware import GIB
from lockstep.plan.predict import Items, Phase, Prediction

_SMALLEST = 0.002
"""Items below this share of the peak are summed up as others."""


def describe(config: Config, prediction: Prediction) -> Iterator[str]:
    """The lines of a plan, up to the verdict."""
    hardware = prediction.hardware
    used = f" ({prediction.num_gpus} used)" if prediction.num_gpus < hardware.num_gpus else ""
    yield f"Model: {_count(prediction.num_parameters)} parameters in {config.model.params_dtype}."
    yield f"Machine: {hardware}{used}."
    yield from _batches(config, prediction)
    if prediction.num_gpus:
        yield ""
        yield from _table("GiB on the fullest GPU", prediction.phases, lambda phase: phase.gpu, hardware.gpu_bytes)
    yield ""
    yield from _table("GiB of host memory", prediction.phases, lambda phase: phase.host, prediction.host_limit)


def _count(number: int) -> str:
    return f"{number / 1e9:,.2f} billion" if number >= 1e9 else f"{number / 1e6:,.2f} million"


def _batches(config: Config, prediction: Prediction) -> Iterator[str]:
    rollout, batches = config.rollout, prediction.batches
    steps = batches.steps_per_rollout
    yield (
        f"A rollout is {rollout.rollout_batch_size:,} prompts x {rollout.n_samples_per_prompt:,} samples = "
        f"{batches.samples_per_rollout:,} samples, which make {steps:,} "
        f"{'step' if steps == 1 else 'steps'} of {rollout.global_batch_size:,}."
    )
    share = "" if batches.samples_per_rank == rollout.global_batch_size else " of each data-parallel rank"
    yield (
        f"A sample has at most {batches.longest_sample:,} tokens, so a step{share} has at most "
        f"{batches.tokens_per_step:,}: {batches.num_micro_batches:,} micro-batches of "
        f"{batches.micro_batch_tokens:,}."
    )
    if rollout.rollout_max_context_len is None and rollout.rollout_max_prompt_len is None:
        yield "No option limits prompts, so the model's own limit counts: --rollout-max-prompt-len sets another."
    if prediction.kv_tokens:
        samples = prediction.kv_tokens / batches.longest_sample
        yield f"The KV cache has room for {prediction.kv_tokens:,} tokens: {samples:,.1f} samples of full length."


def _table(title: str, phases: tuple[Phase, ...], items_of: Callable[[Phase], Items], limit: int) -> Iterator[str]:
    peak = max(sum(items_of(phase).values()) for phase in phases)
    largest: Items = {}
    for phase in phases:
        for name, size in items_of(phase).items():
            largest[name] = max(size, largest.get(name, 0))
    shown = sorted((name for name, size in largest.items() if size >= _SMALLEST * peak), key=lambda n: -largest[n])
    rows = [(name, [items_of(phase).get(name, 0) for phase in phases]) for name in shown]
    others = [sum(size for name, size in items_of(p).items() if name not in shown) for p in phases]
    if any(others):
        rows.append(("others", others))
    rows.append(("together", [sum(items_of(phase).values()) for phase in phases]))
    width = max(len(title), *(len(name) for name, _ in rows))
    yield f"{title:{width}}" + "".join(f"{phase.name:>11}" for phase in phases)
    for name, sizes in rows:
        yield f"{name:{width}}" + "".join(f"{_gib(size):>11}" for size in sizes)
    yield f"{'there is':{width}}" + f"{_gib(limit):>11}"


def _gib(size: int) -> str:
    digits = 1 if size >= GIB else 3
    return f"{size / GIB:.{digits}f}" if size else "."


def verdict(prediction: Prediction) -> str:
    """One sentence."""
    if prediction.fits:
        left = f"{_left(prediction.host_limit - prediction.host_peak)} of host memory"
        if prediction.num_gpus:
            left = f"{_left(prediction.hardware.gpu_bytes - prediction.gpu_peak)} of a GPU and {left}"
        return f"It fits: {left} are left."
    missing = []
    if prediction.missing_gpu_bytes:
        phase = max(prediction.phases, key=lambda phase: phase.gpu_bytes)
        missing.append(f"{_left(prediction.missing_gpu_bytes)} are missing on a GPU ({phase.name}, {phase.moment})")
    if prediction.missing_host_bytes:
        phase = max(prediction.phases, key=lambda phase: phase.host_bytes)
        missing.append(f"{_left(prediction.missing_host_bytes)} of host memory are missing ({phase.name})")
    return f"It does not fit: {' and '.join(missing)}."


def _left(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB // 10 else f"{size / 2**20:.0f} MiB"


def recommend(changes: tuple[Change, ...]) -> Iterator[str]:
    """What to change."""
    yield "The smallest change that fits:"
    for change in changes:
        yield f"    {change.flags}    ({change.costs})"
