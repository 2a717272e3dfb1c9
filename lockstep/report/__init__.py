"""`lockstep report RUN`: one self-contained page with the curves and samples of a run.

The page holds its script, its style and its data, and asks the network for nothing.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from lockstep import metrics as declared
from lockstep.errors import DataError
from lockstep.report import charts
from lockstep.report.charts import Chart, ChartSpec, Row
from lockstep.report.samples import Record, Selection, samples_path, select_samples, write_samples
from lockstep.tracking.jsonl import FILE_NAME, read_steps
from lockstep.tracking.transfer import duration

__all__ = ["samples_path", "select_samples", "write_report", "write_samples"]


@dataclass(frozen=True)
class KeyNumber:
    """One card at the top of the page."""

    label: str
    value: str
    was: str | None = None
    note: str = ""


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Write the page of a run, by default to `run_dir/report.html`, and return where it is.

    Raises:
        DataError: the run directory or its metrics are missing, or a line in it is not what a run writes.
    """
    rows = _read_rows(run_dir)
    config_toml, options = _read_config(run_dir)
    selection = select_samples(run_dir)
    page = _render(run_dir.resolve().name, rows, config_toml, options, selection)
    output = output or run_dir / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(output.name + ".new")
    unfinished.write_text(page, encoding="utf-8", errors="replace")
    unfinished.replace(output)
    return output


def _read_rows(run_dir: Path) -> list[Row]:
    if not run_dir.is_dir():
        reason = "It is a file." if run_dir.exists() else "There is no such folder."
        raise DataError("RUN", str(run_dir), reason, "Give the folder that `--run-dir` named.")
    rows = read_steps(run_dir / FILE_NAME)
    if not rows:
        raise DataError(
            "RUN",
            str(run_dir),
            f"It holds no finished step in {FILE_NAME}.",
            "Train first: `lockstep train RECIPE.toml` writes it step by step.",
        )
    return rows


def _read_config(run_dir: Path) -> tuple[str, dict[str, Any]]:
    """The run's options as text and as one flat dict; both empty when the run kept none."""
    path = run_dir / "config.toml"
    if not path.exists():
        return "", {}
    text = path.read_text(encoding="utf-8")
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DataError(str(path), str(error), "It is not valid TOML.", "Repair or remove it.") from error
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return text, flat


def _render(name: str, rows: list[Row], config_toml: str, options: dict[str, Any], selection: Selection) -> str:
    environment = Environment(
        loader=PackageLoader("lockstep.report", "page"), autoescape=True, undefined=StrictUndefined
    )
    phases = charts.phase_times(rows)
    sections = [
        _section("Learning", charts.LEARNING, rows),
        _section("Health", charts.HEALTH, rows),
        _section("Speed", charts.SPEED, rows, first=[phases] if phases else []),
    ]
    drawn = [chart for section in sections for chart in section["charts"]]
    for position, chart in enumerate(drawn):
        chart["id"] = f"chart-{position}"
    return environment.get_template("page.html.jinja").render(
        name=name,
        subtitle=_subtitle(options),
        key_numbers=_key_numbers(rows),
        sections=sections,
        samples_note=_samples_note(selection),
        num_samples=len(selection.records),
        glossary=_glossary(rows),
        config_toml=config_toml,
        plotly_js=Markup(get_plotlyjs()),
        data=_script_safe_json({"charts": drawn, "samples": [_embedded(record) for record in selection.records]}),
    )


def _section(title: str, specs: Sequence[ChartSpec], rows: list[Row], first: Sequence[Chart] = ()) -> dict[str, Any]:
    built = [(spec, charts.build(spec, rows)) for spec in specs]
    return {
        "title": title,
        "charts": [chart.as_json() for chart in [*first, *(chart for _, chart in built if chart)]],
        "missing": [spec for spec, chart in built if chart is None],
    }


def _script_safe_json(data: Any) -> Markup:
    """JSON that can stand inside a <script> element: no `<`, so no tag, comment or end of script can begin in it."""
    return Markup(json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"))


def _values(rows: list[Row], metric: str) -> list[float]:
    """The finite values of a metric, in order."""
    return [row[metric] for row in rows if row.get(metric) is not None]


def _number(value: float) -> str:
    if value == 0 or 0.001 <= abs(value) < 1000:
        return f"{value:.3f}".rstrip("0").rstrip(".")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1e}"


def _before_and_after(values: list[float], label: str, note: str) -> KeyNumber:
    return KeyNumber(label, _number(values[-1]), was=_number(values[0]) if len(values) > 1 else None, note=note)


def _key_numbers(rows: list[Row]) -> list[KeyNumber]:
    numbers = []
    for metric in charts.matching(rows, "eval/{name}"):
        if accuracies := _values(rows, metric):
            label = f"held-out {metric.removeprefix('eval/')}"
            numbers.append(_before_and_after(accuracies, label, "first to last evaluation"))
    if rewards := _values(rows, "rollout/raw_reward"):
        numbers.append(_before_and_after(rewards, "training reward", f"best {_number(max(rewards))}"))
    num_steps = sum(row["step"] >= 0 for row in rows)
    numbers.append(KeyNumber("steps", f"{num_steps:,}", note=f"the last is number {rows[-1]['step']}"))
    if seconds := _values(rows, "perf/step_time"):
        note = f"{sum(seconds) / len(seconds):.1f} s a step"
        numbers.append(KeyNumber("time", duration(sum(seconds)), note=note))
    if tokens := _values(rows, "rollout/response_tokens"):
        note = f"{sum(tokens) / len(tokens):,.0f} a step"
        numbers.append(KeyNumber("tokens sampled", f"{sum(tokens):,.0f}", note=note))
    if differences := _values(rows, "train/train_rollout_logprob_abs_diff_max"):
        note = "largest log-prob difference"
        numbers.append(KeyNumber("sampler against trainer", _number(max(differences)), note=note))
    return numbers


def _subtitle(options: dict[str, Any]) -> str:
    batch, samples = options.get("rollout_batch_size"), options.get("n_samples_per_prompt")
    parts = [
        Path(str(options["hf_checkpoint"])).name if options.get("hf_checkpoint") else "",
        options.get("advantage_estimator") or "",
        f"{batch} prompts x {samples} samples a step" if batch and samples else "",
        f"learning rate {options['lr']:g}" if options.get("lr") else "",
    ]
    return " · ".join(part for part in parts if part)


def _samples_note(selection: Selection) -> str:
    shown = f"{len(selection.records):,} of {selection.num_samples:,} samples"
    if selection.is_complete:
        return f"All {selection.num_samples:,} samples that the run kept."
    return f"{shown}, spread evenly over {selection.num_steps:,} kept steps. The rest is in the run's samples folder."


def _glossary(rows: list[Row]) -> list[tuple[str, declared.Metric | None]]:
    names = sorted({name for row in rows for name in row if name != "step"})
    return [(name, declared.find(name)) for name in names]


def _embedded(record: Record) -> dict[str, Any]:
    """A record with the numbers a reader needs: per token the sampler's log-prob and its distance to the trainer's."""
    sampler, trainer = record.get("rollout_log_probs") or [], record.get("policy_log_probs") or []
    names = ("step", "group_index", "index", "prompt", "response", "label", "status", "eval")
    return {name: record.get(name) for name in names} | {
        "reward": _short(record.get("reward")),
        "advantage": _short(record.get("advantage")),
        "tokens": record.get("response_tokens") or [],
        "log_probs": [_short(value) for value in sampler],
        "differences": [_short(abs(a - b)) for a, b in zip(trainer, sampler, strict=False)],
        "loss_mask": record.get("loss_mask") or [],
        "cut_tokens": record.get("cut_tokens", 0),
    }


def _short(value: float | None) -> float | None:
    """The number with four significant digits; None for what JSON cannot say."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")
