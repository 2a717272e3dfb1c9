"""Draws the quickstart's learning curve from a run's `metrics.jsonl`, as the SVG that the README shows.

python recipes/quickstart/plot_curve.py runs/quickstart docs/img/quickstart.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lockstep.tracking.jsonl import read_steps

WIDTH, HEIGHT = 720, 340
LEFT, RIGHT, TOP, BOTTOM = 56, 696, 48, 292
"""Borders of the plot, in pixels from the left and from the top."""

Point = tuple[float, float]
"""(optimizer steps that the weights had taken, share of right answers)."""


def curves(rows: Sequence[dict[str, Any]]) -> tuple[list[Point], list[Point]]:
    """Training reward and held-out accuracy. Step k samples before its update and evaluates after it."""
    reward = [(row["step"], row["rollout/raw_reward"]) for row in rows if "rollout/raw_reward" in row]
    heldout = [(row["step"] + 1, row["eval/heldout"]) for row in rows if "eval/heldout" in row]
    return reward, heldout


def draw(reward: Sequence[Point], heldout: Sequence[Point]) -> str:
    """The figure: training reward as a line, held-out accuracy as points, the first and the last with their values."""
    last = max(step for step, _ in heldout)

    def x(step: float) -> float:
        return LEFT + (RIGHT - LEFT) * step / max(1, last)

    def y(share: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * share

    def text(left: float, top: float, words: str, style: str = "") -> str:
        return f'<text x="{left:.1f}" y="{top:.1f}" class="{style}">{words}</text>'

    body = [text(LEFT, 24, "Share of right answers")]
    for share in (0, 0.25, 0.5, 0.75, 1):
        body += [f'<path d="M{LEFT} {y(share):.1f}H{RIGHT}"/>', text(LEFT - 8, y(share) + 4, f"{share:g}", "end")]
    body += [text(x(step), BOTTOM + 20, f"{step:g}", "middle") for step, _ in heldout]
    body += [
        text((LEFT + RIGHT) / 2, BOTTOM + 40, "optimizer steps", "middle"),
        f'<polyline points="{" ".join(f"{x(step):.1f},{y(share):.1f}" for step, share in reward)}"/>',
        text(RIGHT, y(0.25) + 18, "training prompts, as sampled", "end reward"),
        *(f'<circle cx="{x(step):.1f}" cy="{y(share):.1f}" r="5"/>' for step, share in heldout),
        text(RIGHT, y(0.25) + 38, "held-out prompts", "end heldout"),
        text(x(0) + 10, y(heldout[0][1]) + 16, f"{heldout[0][1]:.2f}", "heldout"),
        text(RIGHT, y(heldout[-1][1]) + 22, f"{heldout[-1][1]:.2f}", "end heldout"),
    ]
    return _PAGE.format(width=WIDTH, height=HEIGHT, body="\n".join(body))


_PAGE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"
     aria-label="Share of right answers over optimizer steps, on held-out and on training prompts">
<style>
text {{ font: 13px system-ui, sans-serif; fill: #444 }}
.end {{ text-anchor: end }} .middle {{ text-anchor: middle }}
.reward {{ fill: #b06f14 }} .heldout {{ font-weight: 600; fill: #1f4e9c }}
path {{ stroke: #ddd }} polyline {{ fill: none; stroke: #e39b3c; stroke-width: 2 }} circle {{ fill: #1f4e9c }}
</style>
<rect width="100%" height="100%" rx="8" fill="#fff"/>
{body}
</svg>
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the learning curve of a quickstart run.")
    parser.add_argument("run_dir", type=Path, help="folder of the run")
    parser.add_argument("output", type=Path, help="SVG to write")
    arguments = parser.parse_args()
    arguments.output.write_text(draw(*curves(read_steps(arguments.run_dir / "metrics.jsonl"))))


if __name__ == "__main__":
    main()
