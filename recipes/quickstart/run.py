"""The quickstart: make a small model and data, warm up by imitation, then learn by reinforcement.

    ./scripts/quickstart [--output DIR] [--seed N] [options of `lockstep train` for the GRPO phase]

Exits with 1 when reinforcement raised held-out accuracy by less than 0.3.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from prepare import prepare

HERE = Path(__file__).parent
REQUIRED_RISE = 0.3


def train(recipe: str, *options: str) -> None:
    """Run `lockstep train` exactly as a user would; its exit code ends the quickstart if it is not 0."""
    process = subprocess.Popen([sys.executable, "-m", "lockstep", "train", str(HERE / recipe), *options])
    try:
        code = process.wait()
    except KeyboardInterrupt:
        code = process.wait()  # it has heard of it too, and saves
        print("quickstart: stopped; run it again to begin anew", file=sys.stderr)
    if code != 0:
        sys.exit(code)


def require_valid(recipe: str, *options: str) -> None:
    """Refuse a mistyped option before anything is made."""
    command = [sys.executable, "-m", "lockstep", "train", str(HERE / recipe), *options, "--dry-run"]
    if code := subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        sys.exit(code)


def heldout_accuracies(run_dir: Path) -> tuple[list[float], int]:
    """Held-out accuracy at every evaluation, the first one before training; and the number of steps."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["eval/heldout"] for row in rows if "eval/heldout" in row], rows[-1]["step"] + 1


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/quickstart", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder of all that it makes")
    parser.add_argument("--seed", type=int, default=0, help="of weights, problems and samples")
    arguments, grpo_options = parser.parse_known_args()
    started = time.monotonic()
    output: Path = arguments.output
    data, warm = output / "data", output / "sft"

    seeds = ("--seed", str(arguments.seed), "--rollout-seed", str(arguments.seed))
    reinforcement = (
        "--hf-checkpoint", str(warm / "hf"), "--prompt-data", str(data / "train.jsonl"),
        "--eval-prompt-data", "heldout", str(data / "heldout.jsonl"), "--save", str(output / "checkpoints"),
        "--run-dir", str(output), *seeds, *grpo_options,
    )  # fmt: skip
    require_valid("grpo.toml", *reinforcement)

    print("quickstart 1/3: making a Qwen3-MoE checkpoint, a tokenizer and addition problems", flush=True)
    prepare(data, arguments.seed)
    print("quickstart 2/3: warming up by imitating a sloppy teacher (supervised fine-tuning)", flush=True)
    train(
        "sft.toml", "--hf-checkpoint", str(data / "model"), "--prompt-data", str(data / "sft.jsonl"),
        "--save-hf", str(warm / "hf"), "--save", str(warm / "checkpoints"), "--run-dir", str(warm), *seeds,
    )  # fmt: skip
    print("quickstart 3/3: learning to carry by reinforcement (GRPO)", flush=True)
    train("grpo.toml", *reinforcement)

    accuracies, steps = heldout_accuracies(output)
    before, after = accuracies[0], accuracies[-1]
    if after - before < REQUIRED_RISE:
        print(f"quickstart: reinforcement raised held-out accuracy by less than {REQUIRED_RISE}", file=sys.stderr)
    print(
        f"quickstart: held-out accuracy {before:.2f} -> {after:.2f}, {steps} steps, "
        f"{time.monotonic() - started:.0f} s, report {output / 'report.html'}"
    )
    return 0 if after - before >= REQUIRED_RISE else 1


if __name__ == "__main__":
    sys.exit(main())
