"""Speed of `lockstep convert` both ways against a plain copy of the same files in the same run, one process.

    python benchmarks/convert.py OUTPUT.json [--folder FOLDER]

Each round copies the weights with an fsync before each conversion, which flushes, too; the page cache is warm.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from formats import COMMON, GOAL, SHAPES, copy, environment, seconds, write_folder

from lockstep.checkpoint.megatron import hf_to_torch_dist, torch_dist_to_hf

ROUNDS = 7
NEXT = COMMON | {
    "model_type": "qwen3_next", "vocab_size": 32768, "hidden_size": 2048, "num_hidden_layers": 4,
    "intermediate_size": 5120, "num_key_value_heads": 2, "head_dim": 256, "num_experts": 64, "num_experts_per_tok": 10,
    "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "norm_topk_prob": True,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "partial_rotary_factor": 0.25, "tie_word_embeddings": False,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of lockstep convert against a plain copy.")
    parser.add_argument("output", type=Path, help="file for the result as JSON")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; needs about 6 GB")
    options = parser.parse_args()
    result: dict[str, Any] = environment() | {"rounds": ROUNDS}
    for name, shape in (SHAPES | {"Qwen3-Next, 4 layers of 64 experts": NEXT}).items():
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            result[name] = measure(shape, Path(folder))
        print(name, json.dumps(result[name]), flush=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


def measure(shape: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Median GB/s of each way, and the median ratio to the copy before it."""
    source, copied, there, back = (folder / name for name in ("source", "copied", "there", "back"))
    num_bytes, num_tensors = write_folder(shape, source)
    ways = {
        "hf_to_torch_dist": lambda: hf_to_torch_dist(source, there),
        "torch_dist_to_hf": lambda: torch_dist_to_hf(there, source, back),
    }
    times: dict[str, list[float]] = {"copy": [], **{way: [] for way in ways}}
    ratios: dict[str, list[float]] = {way: [] for way in ways}
    for round_number in range(1 + ROUNDS):
        for way, convert in ways.items():
            copy_s = timed(lambda: copy(source, copied, flush=True))
            shutil.rmtree(copied)
            convert_s = timed(convert)
            if round_number:
                times["copy"].append(copy_s)
                times[way].append(convert_s)
                ratios[way].append(copy_s / convert_s)
        shutil.rmtree(there)
        shutil.rmtree(back)
    over_copy = {way: statistics.median(found) for way, found in ratios.items()}
    return {
        "gbytes": num_bytes / 1e9,
        "tensors": num_tensors,
        "gbytes_per_s": {name: round(num_bytes / 1e9 / statistics.median(found), 2) for name, found in times.items()},
        "over_copy": {way: round(ratio, 2) for way, ratio in over_copy.items()},
        "goal_is_met": min(over_copy.values()) >= GOAL,
        "seconds": {name: [round(time_s, 3) for time_s in found] for name, found in times.items()},
    }


def timed(action: Any) -> float:
    os.sync()
    return seconds(action)


if __name__ == "__main__":
    main()
