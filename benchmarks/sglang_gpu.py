"""GRPO on SGLang's servers that share the trainer's GPU: reward, log-prob difference, weight updates, freed memory.

The task and the warm-up are the quickstart's; the model has heads of 128, as SGLang's fast attention wants them.

    python benchmarks/sglang_gpu.py warm-up OUTPUT          makes model and data; seconds on a GPU, minutes on a CPU
    python benchmarks/sglang_gpu.py run OUTPUT RESULT.json --sglang-python PYTHON [options of `lockstep train`]
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).parent
QUICKSTART = HERE.parent / "recipes" / "quickstart"
sys.path.insert(0, str(QUICKSTART))
import prepare as quickstart  # noqa: E402

SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "intermediate_size": 384,
}
SERVER = {
    "attention-backend": "fa3",
    "sampling-backend": "pytorch",
    "grammar-backend": "none",
    "cuda-graph-backend-prefill": "disabled",
    "skip-server-warmup": "",
    "mm-feature-transport": "cpu",
    "mem-fraction-static": "0.3",
    "cuda-graph-bs": "8 16 32 64 128 256",
    "max-running-requests": "256",
    "context-length": "512",
}
"""`--sglang-*` of the run."""


def make_weights(config: dict[str, Any]) -> dict[str, Tensor]:
    """The quickstart's, with one feed-forward layer in place of experts."""
    generator = torch.Generator().manual_seed(0)
    dense = {name: w for name, w in quickstart.make_weights(config, 0).items() if ".mlp." not in name}
    hidden, width = config["hidden_size"], config["intermediate_size"]
    for layer in range(config["num_hidden_layers"]):
        for name, shape in {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}.items():
            weight = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
            dense[f"model.layers.{layer}.mlp.{name}_proj.weight"] = weight
    return dense


def train(*words: str) -> int:
    return subprocess.run([sys.executable, "-m", "lockstep", "train", *words], check=False).returncode


def warm_up(output: Path, num_rollout: str) -> int:
    data = output / "data"
    quickstart.prepare(data, 0)
    sparse = quickstart.make_config() | SHAPE
    config = {name: value for name, value in sparse.items() if not re.search("exp|moe_|topk|sparse|mlp_|rout", name)}
    quickstart.write_json(data / "model" / "config.json", config)
    save_file(make_weights(sparse), data / "model" / "model.safetensors", metadata={"format": "pt"})
    return train(
        str(QUICKSTART / "sft.toml"), "--hf-checkpoint", str(data / "model"),
        "--prompt-data", str(data / "sft.jsonl"), "--save-hf", str(output / "hf"),
        "--save", str(output / "sft" / "checkpoints"), "--run-dir", str(output / "sft"),
        "--num-rollout", num_rollout,
    )  # fmt: skip


def run(output: Path, result: Path, options: list[str]) -> int:
    run_dir, started = output / "grpo", time.perf_counter()
    server = [word for name, value in SERVER.items() for word in (f"--sglang-{name}", *value.split())]
    command = [
        sys.executable, "-m", "lockstep", "train", str(QUICKSTART / "grpo.toml"), "--hf-checkpoint", str(output / "hf"),
        "--prompt-data", str(output / "data" / "train.jsonl"),
        "--eval-prompt-data", "heldout", str(output / "data" / "heldout.jsonl"),
        "--params-dtype", "bfloat16", "--rollout-engine", "sglang", "--run-dir", str(run_dir),
        "--max-tokens-per-gpu", "32768", "--num-rollout", "30", "--lr", "1e-4", "--eval-interval", "1000",
        "--save", str(output / "grpo-checkpoints"), "--save-interval", "1000", *server, *options,
    ]  # fmt: skip
    with gpu_memory() as memory:
        done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    sys.stderr.write(done.stderr[-4000:])
    found = summary(run_dir, done.stderr, command) | {"seconds": time.perf_counter() - started, "memory_gib": memory}
    result.write_text(json.dumps(found))
    return done.returncode


@contextmanager
def gpu_memory() -> Iterator[list[tuple[float, float]]]:
    """Memory in use on the GPU, by all processes: seconds and GiB, every tenth of a second, where it changes."""
    seen: list[tuple[float, float]] = []
    over = threading.Event()
    started = time.perf_counter()

    def look() -> None:
        while not over.wait(0.1):
            free, total = torch.cuda.mem_get_info()
            used = round((total - free) / 2**30, 2)
            if not seen or seen[-1][1] != used:
                seen.append((round(time.perf_counter() - started, 2), used))

    thread = threading.Thread(target=look)
    if torch.cuda.is_available():
        thread.start()
    try:
        yield seen
    finally:
        over.set()
        if thread.is_alive():
            thread.join()


def summary(run_dir: Path, log: str, command: list[str]) -> dict[str, Any]:
    """What the run is for, and all metrics."""
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    steps = [row for row in rows if row["step"] >= 0]
    updates = [row["perf/update_weights_time"] for row in steps if "perf/update_weights_time" in row]
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "torch": torch.__version__,
        "command": " ".join(command[1:]),
        "num_steps": len(steps),
        "heldout": [row["eval/heldout"] for row in rows if "eval/heldout" in row],
        "reward": [row.get("rollout/raw_reward") for row in steps],
        "logprob_abs_diff": [row.get("train/train_rollout_logprob_abs_diff") for row in steps],
        "update_weights_s": updates,
        "rollout_s": [row.get("perf/rollout_time") for row in steps],
        "log": [line for line in log.splitlines() if re.search(r"SGLang", line)],
        "server_log": server_log(run_dir),
        "rows": rows,
    }


def server_log(run_dir: Path) -> list[str]:
    """What the server says of starting, of its memory and of weights; all of it where it has not started."""
    path = run_dir / "sglang" / "server-0.log"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    if not any("fired up" in line for line in lines):
        return lines[-80:]
    return [line[:400] for line in lines if re.search(r"mem|timings|Traceback|rror|fired", line)][:60]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("warm-up")
    first.add_argument("output", type=Path)
    first.add_argument("--num-rollout", default="400")
    second = commands.add_parser("run")
    second.add_argument("output", type=Path)
    second.add_argument("result", type=Path)
    options, rest = parser.parse_known_args()
    if options.command == "warm-up":
        return warm_up(options.output, options.num_rollout)
    return run(options.output, options.result, rest)


if __name__ == "__main__":
    sys.exit(main())
