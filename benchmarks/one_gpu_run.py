"""A recipe as a user runs it, with random weights: rollouts, training, what passes between them, and peaks of memory.

    python benchmarks/one_gpu_run.py OUTPUT [--recipe qwen3-30b-a3b-1gpu] [--shape JSON] [options of `lockstep train`]

The published config.json, the quickstart's tokenizer and prompts, `--load-format dummy`; without evaluation and
checkpoints. Responses of such a model are as long as they may be. `--shape` changes config.json, to rehearse.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import tomli_w

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes" / "quickstart"))
import prepare as quickstart  # noqa: E402

SHOWN = {
    "perf/rollout_time": "rollout s",
    "perf/actor_train_time": "training s",
    "perf/step_time": "step s",
    "rollout/response_tokens": "new tokens",
    "perf/actor_train_tok_per_s": "trained tokens/s",
    "train/train_rollout_logprob_abs_diff": "log-prob difference",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--recipe", default="qwen3-30b-a3b-1gpu")
    parser.add_argument("--shape", type=json.loads, default={})
    options, words = parser.parse_known_args()
    recipe = write_inputs(options.output, options.recipe, options.shape)
    run_dir = (options.output / "run").resolve()
    command = [sys.executable, "-m", "lockstep", "train", str(recipe), "--load-format", "dummy"]
    command += ["--run-dir", str(run_dir), *words]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, end="")
    if done.returncode:
        return done.returncode
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "train/loss" in row]
    result = {"command": command[1:], "steps": steps, "output": done.stdout.splitlines()[-8:]}
    (options.output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print("| step |", " | ".join(SHOWN.values()), "|")
    for row in steps:
        print(f"| {row['step']} |", " | ".join(f"{row.get(name, float('nan')):.4g}" for name in SHOWN), "|")
    return 0


def write_inputs(output: Path, name: str, shape: dict[str, Any]) -> Path:
    """Model folder without weights, prompts, and the recipe without what needs other files."""
    output.mkdir(parents=True, exist_ok=True)
    recipe = tomllib.loads((ROOT / "recipes" / name / "recipe.toml").read_text())
    model = output / "model"
    quickstart.make_checkpoint(model, 0)
    (model / "model.safetensors").unlink()
    own = json.loads((model / "config.json").read_text())
    published = ROOT / "recipes" / "models" / Path(recipe["model"]["hf_checkpoint"]).name / "config.json"
    ends = {key: own[key] for key in ("eos_token_id", "bos_token_id", "pad_token_id") if key in own}
    quickstart.write_json(model / "config.json", json.loads(published.read_text()) | ends | shape)
    quickstart.write_rows(output / "prompts.jsonl", quickstart.make_prompt_rows("train", 64, 0))
    recipe["model"]["hf_checkpoint"] = str(model.resolve())
    recipe["data"] |= {"prompt_data": str((output / "prompts.jsonl").resolve())}
    recipe["rollout"]["num_rollout"] = 3
    recipe["reward"] = {"rm_type": "random"}
    for table in ("checkpoint", "eval"):
        recipe.pop(table, None)
    recipe["algorithm"]["logprob_diff_limit"] = 100.0
    path = output / "recipe.toml"
    path.write_bytes(tomli_w.dumps(recipe).encode())
    return path


if __name__ == "__main__":
    sys.exit(main())
