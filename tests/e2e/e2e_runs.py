"""A tiny Qwen3-MoE with data of its own, and `lockstep` as a real process on it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import FileSystemReader

from lockstep.checkpoint.tensors import load_tensors

HERE = Path(__file__).parent
PREPARE = HERE.parents[1] / "recipes" / "quickstart" / "prepare.py"
HOOKS = HERE / "e2e_hooks.py"
TIMEOUT_S = 180

SYSTEM = "You add numbers. " * 2
"""Longer than a block of the cache, so that prompts share a prefix across groups."""
SHAPE = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "max_position_embeddings": 128,
}


def hook(name: str) -> str:
    """The option value that names a function of e2e_hooks.py."""
    return f"{HOOKS}:{name}"


def flags(options: dict[str, Any]) -> list[str]:
    """Options as command-line words; True is a bare flag, None is left out."""
    words: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += [str(item) for item in (value if isinstance(value, list | tuple) else [value])]
    return words


def load_prepare() -> ModuleType:
    """The quickstart's generator of checkpoints and data."""
    spec = importlib.util.spec_from_file_location("quickstart_prepare", PREPARE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write_model(folder: Path, seed: int = 0, **shape: Any) -> Path:
    """An HF folder of the quickstart's architecture, smaller, with random weights."""
    prepare = load_prepare()
    folder.mkdir(parents=True)
    prepare.make_checkpoint(folder, seed)
    config = prepare.make_config() | SHAPE | shape
    prepare.write_json(folder / "config.json", config)
    save_file(prepare.make_weights(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@dataclass(frozen=True)
class Workshop:
    """What runs are made of."""

    root: Path
    model: Path
    data: Path
    heldout: Path

    def options(self, run: Path, **changes: Any) -> dict[str, Any]:
        """A GRPO run of seconds in the folder `run`; `changes` replace options, None removes one."""
        return {
            "hf_checkpoint": self.model,
            "params_dtype": "float32",
            "num_threads": 1,
            "prompt_data": self.data,
            "input_key": "prompt",
            "label_key": "label",
            "apply_chat_template": True,
            "rollout_shuffle": True,
            "num_rollout": 2,
            "rollout_batch_size": 3,
            "n_samples_per_prompt": 4,
            "rollout_max_response_len": 10,
            "custom_rm_path": hook("digits"),
            "lr": 1e-3,
            "lr_decay_style": "constant",
            "micro_batch_size": 4,
            "run_dir": run,
        } | changes

    def train(self, run: Path, **changes: Any) -> list[str]:
        return ["train", *flags(self.options(run, **changes))]


def make_workshop(root: Path) -> Workshop:
    """A model and prompts in the folder `root`."""
    prepare = load_prepare()
    for side, count in (("train", 64), ("heldout", 8)):
        rows = [
            row | {"prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["prompt"]}]}
            for row in prepare.make_prompt_rows(side, count, 0)
        ]
        prepare.write_rows(root / f"{side}.jsonl", rows)
    return Workshop(root, write_model(root / "model"), root / "train.jsonl", root / "heldout.jsonl")


def start(*words: str, env: dict[str, str] | None = None, **popen: Any) -> subprocess.Popen[str]:
    """`lockstep` as a process of its own, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "lockstep", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | (env or {}),
        **popen,
    )


def finish(process: subprocess.Popen[str], timeout: float = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """Wait for a started process; one that hangs is killed and fails the test."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        stdout, stderr = process.communicate()
        pytest.fail(f"lockstep did not end within {timeout:g} s:\n{stdout}\n{stderr}")
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def run(
    *words: str, env: dict[str, str] | None = None, code: int = 0, **popen: Any
) -> subprocess.CompletedProcess[str]:
    """Run `lockstep` to its end and check the exit code."""
    done = finish(start(*words, env=env, **popen))
    assert done.returncode == code, f"exit code {done.returncode}, expected {code}:\n{done.stdout}\n{done.stderr}"
    return done


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Every step of metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("perf/")} for row in rows]


def checkpoint_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a training checkpoint by name."""
    stored = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    load_tensors(folder, tensors)
    return tensors


def assert_same_checkpoint(folder: Path, expected: Path) -> None:
    """Bit for bit, counters and random states included."""
    assert json.loads((folder / "state.json").read_text()) == json.loads((expected / "state.json").read_text())
    tensors, others = checkpoint_tensors(folder), checkpoint_tensors(expected)
    assert tensors.keys() == others.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []


def living(token: str) -> list[int]:
    """Processes that carry `E2E_TOKEN=token` in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("E2E_TOKEN") == token and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def assert_nobody_lives(token: str) -> None:
    """The processes of a run are gone, at the latest after a moment."""
    deadline = time.monotonic() + 10
    while living(token):
        assert time.monotonic() < deadline, f"processes {living(token)} outlived their run"
        time.sleep(0.05)
