"""What the report draws: which metrics share a chart, and how metrics.jsonl becomes lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lockstep import metrics as declared

Row = dict[str, Any]
Kind = Literal["linear", "log", "stacked"]

SMOOTH_FROM = 24
"""Steps from which a noisy line gets a running mean over a twelfth of the run."""

PHASES = (
    ("sampling and rewards", "perf/rollout_time"),
    ("reference log-probs", "perf/ref_log_probs_time"),
    ("old log-probs", "perf/log_probs_time"),
    ("update", "perf/actor_train_time"),
    ("eval", "perf/eval_time"),
    ("save", "perf/save_model_time"),
)


@dataclass(frozen=True)
class Line:
    name: str
    x: list[int]
    y: list[float | None]
    is_faint: bool = False
    """Raw values behind their running mean."""
    color: int | None = None
    """Place in the page's palette, for lines that keep their colour from run to run. Default: the line's own place."""


@dataclass(frozen=True)
class Chart:
    title: str
    about: str
    unit: str
    kind: Kind
    lines: list[Line]
    has_legend: bool = True

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ChartSpec:
    """One chart: its metrics (as declared) with the names of their lines ("" keeps the metric's own free part)."""

    title: str
    about: str
    unit: str
    metrics: tuple[tuple[str, str], ...]
    remedy: str
    """What to do to get these metrics, shown when the run has none of them."""
    kind: Kind = "linear"
    is_noisy: bool = False


LEARNING = (
    ChartSpec(
        "Reward",
        "Mean reward of the training samples. It should rise.",
        "reward",
        (("rollout/raw_reward", "reward"),),
        "It comes with every rollout; an SFT run has none.",
        is_noisy=True,
    ),
    ChartSpec(
        "Held-out evaluation",
        "Mean reward on prompts that training never sees. This is the curve that counts.",
        "reward",
        (("eval/{name}", ""),),
        "Set --eval-prompt-data and --eval-interval.",
    ),
    ChartSpec(
        "Response length",
        "Tokens the policy wrote per sample. A drift to the limit, or to nothing, is a warning.",
        "tokens",
        (
            ("rollout/response_len/mean", "mean"),
            ("rollout/response_len/median", "median"),
            ("rollout/response_len/max", "longest"),
        ),
        "It comes with every rollout; an SFT run has none.",
    ),
    ChartSpec(
        "Entropy",
        "How undecided the policy is per token. Near 0 it has stopped exploring.",
        "nat",
        (("train/entropy_loss", "entropy"),),
        "It comes with every policy update; an SFT run has none.",
    ),
    ChartSpec(
        "KL",
        "Distance of the policy from the one that sampled, and from the reference model.",
        "nat",
        (("train/ppo_kl", "to the old policy"), ("train/kl_loss", "to the reference")),
        "Set --use-kl-loss and --ref-load for the distance from a reference model.",
    ),
    ChartSpec("Loss", "What the optimizer minimises.", "nat", (("train/loss", "loss"),), "It comes with every update."),
)
HEALTH = (
    ChartSpec(
        "Sampler against trainer",
        "Difference of their log-probs for the same token and weights; rounding only, so tiny and flat.",
        "nat",
        (
            ("train/train_rollout_logprob_abs_diff_max", "largest"),
            ("train/train_rollout_logprob_abs_diff", "mean"),
        ),
        "It comes with every policy update; an SFT run has none.",
        kind="log",
    ),
    ChartSpec(
        "Gradient norm",
        "Before clipping. Single peaks are harmless; growth is not.",
        "1",
        (("train/grad_norm", "gradient norm"),),
        "It comes with every update.",
    ),
    ChartSpec(
        "Groups without a signal",
        "Groups whose samples all got the same reward: too easy or too hard, and nothing to learn from.",
        "groups",
        (("rollout/zero_std/count_{reward}", ""),),
        "No group was flat so far, or the run has no groups.",
        kind="stacked",
    ),
    ChartSpec(
        "Clipped and cut off",
        "Tokens whose importance ratio was clipped; responses that ran into the length limit.",
        "fraction",
        (("train/pg_clipfrac", "clipped tokens"), ("rollout/truncated_ratio", "truncated responses")),
        "They come with every policy update; an SFT run has none.",
    ),
)
SPEED = (
    ChartSpec(
        "Throughput",
        "Tokens per second while sampling (per GPU) and while updating.",
        "tokens/s",
        (("perf/tokens_per_gpu_per_sec", "sampling"), ("perf/actor_train_tok_per_s", "update")),
        "It comes with every step.",
    ),
    ChartSpec(
        "Efficiency",
        "How much of each step the trainer waits, and what the prefix cache saves.",
        "fraction",
        (
            ("perf/wait_time_ratio", "waiting"),
            ("rollout/prefix_cache_hit_rate", "prefix cache hits"),
        ),
        "It comes with every step.",
    ),
)


def line(rows: Sequence[Row], metric: str, name: str) -> Line:
    """One metric over the steps that logged it."""
    points = [(row["step"], row[metric]) for row in rows if metric in row]
    return Line(name, [step for step, _ in points], [value for _, value in points])


def matching(rows: Sequence[Row], declaration: str) -> list[str]:
    """The metrics of a run that are `declaration`, or that it covers when it holds a free part; sorted."""
    names = {name for row in rows for name in row if name != "step"}
    covers = {name: metric.name for name in names if (metric := declared.find(name))}
    return sorted(name for name in names if declaration in (name, covers.get(name)))


def build(spec: ChartSpec, rows: Sequence[Row]) -> Chart | None:
    """The chart of a spec, None when the run has none of its metrics."""
    lines = []
    for declaration, label in spec.metrics:
        fixed, _, _ = declaration.partition("{")
        for metric in matching(rows, declaration):
            lines.append(line(rows, metric, label or metric.removeprefix(fixed)))
    if spec.kind == "log":
        lines = [Line(each.name, each.x, [value or None for value in each.y]) for each in lines]
    if spec.kind == "stacked":
        lines = [filled(each, rows) for each in lines]
    if spec.is_noisy:
        lines = [drawn for each in lines for drawn in with_running_mean(each)]
    lines = [each for each in lines if any(value is not None for value in each.y)]
    has_legend = len(lines) > 1 or len(spec.metrics) > 1 or spec.kind == "stacked"
    return Chart(spec.title, spec.about, spec.unit, spec.kind, lines, has_legend) if lines else None


def filled(sparse: Line, rows: Sequence[Row]) -> Line:
    """The line over every step after the first rollout, 0 where it was not logged: stacks need all corners."""
    values = dict(zip(sparse.x, sparse.y, strict=True))
    steps = [row["step"] for row in rows if row["step"] >= 0]
    return Line(sparse.name, steps, [values.get(step) or 0.0 for step in steps])


def with_running_mean(raw: Line) -> list[Line]:
    """The line, and for long runs its running mean in front of it."""
    num_steps = len(raw.y)
    if num_steps < SMOOTH_FROM:
        return [raw]
    window = num_steps // 12
    means: list[float | None] = []
    for end in range(1, num_steps + 1):
        recent = [value for value in raw.y[max(0, end - window) : end] if value is not None]
        means.append(sum(recent) / len(recent) if recent else None)
    faint = Line(f"{raw.name}, each step", raw.x, raw.y, is_faint=True)
    return [faint, Line(f"mean of {window} steps", raw.x, means)]


def phase_times(rows: Sequence[Row]) -> Chart | None:
    """Seconds of each step by phase; "other" is the rest of the step."""
    steps = [row for row in rows if "perf/step_time" in row]
    if not steps:
        return None
    lines = [[row.get(metric) or 0.0 for row in steps] for _, metric in PHASES]
    other = [max(0.0, (row["perf/step_time"] or 0.0) - sum(parts)) for row, *parts in zip(steps, *lines, strict=True)]
    x = [row["step"] for row in steps]
    names = [*(name for name, _ in PHASES), "other"]
    named = enumerate(zip(names, [*lines, other], strict=True))
    drawn = [Line(name, x, list(seconds), color=place) for place, (name, seconds) in named if any(seconds)]
    return Chart("Time per phase", "Where the seconds of a step go.", "s", "stacked", drawn)
