"""Speed of loading and exporting HF folders against a plain copy of the same files in the same run.

    python benchmarks/formats.py OUTPUT.json [--folder FOLDER]

Each round copies the weights, loads them, copies them again with an fsync, and exports them, with the page cache warm;
a disk's speed drifts, and neighbours in time share it. Loading includes the model's fresh memory, exporting the
flush to disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor

from lockstep.checkpoint.hf import load_hf_model, save_hf_model
from lockstep.models import build_model, read_model_config
from lockstep.models.hf_names import hf_tensors

ROUNDS = 7
SHARD_BYTES = 5 * 10**8
GOAL = 0.5
COMMON = {
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960, "rope_theta": 1e6, "dtype": "bfloat16",
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "dense, Qwen3-0.6B": COMMON | {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "num_hidden_layers": 28,
        "intermediate_size": 3072, "tie_word_embeddings": True,
    },
    "2 layers of 128 experts, 2048 x 512": COMMON | {
        "model_type": "qwen3_moe", "vocab_size": 32768, "hidden_size": 2048, "num_hidden_layers": 2,
        "intermediate_size": 6144, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
        "norm_topk_prob": True, "tie_word_embeddings": False,
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of HF folders in and out, against a plain copy.")
    parser.add_argument("output", type=Path, help="file for the result as JSON")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; needs about 6 GB")
    options = parser.parse_args()
    result: dict[str, Any] = environment()
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            result[name] = measure(shape, Path(folder))
        print(name, json.dumps(result[name]), flush=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


def environment() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "safetensors": version("safetensors"),
        "threads": torch.get_num_threads(),
        "rounds": ROUNDS,
    }


def measure(shape: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Median GB/s of each action, and the median ratio to the copy before it."""
    source = folder / "source"
    num_bytes, num_tensors = write_folder(shape, source)
    rounds = [one_round(source, folder) for _ in range(1 + ROUNDS)]
    warm = {name: [times[name] for times in rounds[1:]] for name in rounds[0]}
    speeds = {name: num_bytes / 1e9 / statistics.median(times) for name, times in warm.items()}
    ratios = {
        f"{ours}_over_copy": statistics.median(a / b for a, b in zip(warm[theirs], warm[ours], strict=True))
        for ours, theirs in (("load", "copy"), ("export", "copy_and_flush"))
    }
    return {
        "gbytes": num_bytes / 1e9,
        "tensors": num_tensors,
        "gbytes_per_s": {name: round(speed, 2) for name, speed in speeds.items()},
        "ratios": {name: round(ratio, 2) for name, ratio in ratios.items()},
        "goal_is_met": min(ratios.values()) >= GOAL,
        "seconds": {name: [round(time_s, 3) for time_s in times] for name, times in warm.items()},
    }


def one_round(source: Path, folder: Path) -> dict[str, float]:
    """Seconds of each action; what it wrote is deleted before the next."""
    times, copied, exported = {}, folder / "copied", folder / "exported"
    with deleted_after(copied):
        times["copy"] = seconds(lambda: copy(source, copied, flush=False))
    started = time.perf_counter()
    model = load_hf_model(source, dtype=torch.bfloat16, device=torch.device("cpu"))
    times["load"] = time.perf_counter() - started
    with deleted_after(copied):
        times["copy_and_flush"] = seconds(lambda: copy(source, copied, flush=True))
    with deleted_after(exported):
        times["export"] = seconds(lambda: save_hf_model(model, exported, source=source))
    return times


@contextmanager
def deleted_after(folder: Path) -> Iterator[None]:
    yield
    shutil.rmtree(folder)
    os.sync()


def write_folder(shape: dict[str, Any], folder: Path) -> tuple[int, int]:
    """An HF folder of random weights, sharded; returns its bytes of tensors and their number."""
    with torch.device("meta"):
        model = build_model(read_model_config(shape))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape))
    shards: list[dict[str, Tensor]] = [{}]
    sizes = [0]
    for name, parameter in model.named_parameters():
        random = torch.randint(-(2**14), 2**14, parameter.shape, dtype=torch.int16).view(torch.bfloat16)
        for tensor in hf_tensors(name, parameter.shape):
            if sizes[-1] > SHARD_BYTES:
                shards.append({})
                sizes.append(0)
            shards[-1][tensor.name] = random[tensor.index]
            sizes[-1] += shards[-1][tensor.name].nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, str(folder / file), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(sizes), len(weight_map)


def copy(source: Path, target: Path, *, flush: bool) -> None:
    target.mkdir()
    for path in source.glob("*.safetensors"):
        shutil.copyfile(path, target / path.name)
        if flush:
            with (target / path.name).open("rb") as file:
                os.fsync(file.fileno())


def seconds(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
