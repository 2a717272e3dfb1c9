"""GRPO on SGLang's servers: reward, log-prob difference, weight updates, freed memory.

The task and the warm-up are the quickstart's; models have heads of 128, as SGLang's fast attention wants them.

    python benchmarks/sglang_gpu.py warm-up OUTPUT          makes model and data; seconds on a GPU, minutes on a CPU
    python benchmarks/sglang_gpu.py run OUTPUT RESULT.json --sglang-python PYTHON [options of `lockstep train`]
    python benchmarks/sglang_gpu.py case NAME OUTPUT RESULT.json --sglang-python PYTHON [options of `lockstep train`]

`run` learns the task on one GPU that trainer and server share. `case` is a short run of one of `CASES`: what it says of
places, servers and transports, a random model, and every update of the weights compared with an export. It takes the
first GPUs of CUDA_VISIBLE_DEVICES, trainer before servers, so that several can run beside each other. Its exit code is
0 when the run ended well and the server has the options.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor

from lockstep.models import build_model, read_model_config
from lockstep.models.hf_names import hf_tensors
from lockstep.types import Sample

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


@dataclass(frozen=True)
class Case:
    """A layout of trainer and servers.

    Args:
        num_gpus: all of them.
        model: one of `MODELS`.
        options: of `lockstep train`.
        arrived: what the server then says of its arguments.
    """

    num_gpus: int
    model: str
    options: str
    arrived: tuple[str, ...] = ()


WIDE = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "torch_dtype": "bfloat16",
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
MODELS: dict[str, dict[str, Any]] = {
    "dense": SHAPE | WIDE,
    "moe": WIDE | EXPERTS,
    "next": {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "num_hidden_layers": 4,
        "full_attention_interval": 4,
        "partial_rotary_factor": 0.25,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "shared_expert_intermediate_size": 128,
    }
    | WIDE
    | EXPERTS,
}
"""Over the quickstart's config.json."""
CASES = {
    "tp2": Case(3, "dense", "--rollout-num-gpus 2 --rollout-num-gpus-per-engine 2", ("tp_size=2",)),
    "experts": Case(
        3,
        "moe",
        "--rollout-num-gpus 2 --rollout-num-gpus-per-engine 2 --use-rollout-routing-replay --sglang-enable-ep-moe "
        "--sglang-enable-dp-attention --sglang-dp-size 2 --sglang-moe-dense-tp-size 1 --sglang-enable-dp-lm-head "
        "--sglang-ep-num-redundant-experts 16",
        (
            "tp_size=2",
            "ep_size=2",
            "enable_dp_attention=True",
            "dp_size=2",
            "moe_dense_tp_size=1",
            "enable_dp_lm_head=True",
            "ep_num_redundant_experts=16",
            "enable_return_routed_experts=True",
        ),
    ),
    "two-servers": Case(3, "moe", "--rollout-num-gpus 2 --use-rollout-routing-replay"),
    "shared": Case(
        2,
        "moe",
        "--actor-num-gpus-per-node 2 --expert-model-parallel-size 2 --rollout-num-gpus-per-engine 2 "
        "--use-rollout-routing-replay",
        ("tp_size=2", "enable_memory_saver=True"),
    ),
    "draft": Case(
        1,
        "next",
        "--use-rollout-routing-replay --sglang-speculative-algorithm EAGLE --sglang-speculative-num-steps 2 "
        "--sglang-speculative-eagle-topk 1 --sglang-speculative-num-draft-tokens 3 --sglang-decode-log-interval 4",
        (
            "speculative_algorithm='EAGLE'",
            "speculative_num_steps=2",
            "speculative_eagle_topk=1",
            "speculative_num_draft_tokens=3",
            "enable_draft_weights_cpu_backup=True",
            "disable_shared_experts_fusion=True",
        ),
    ),
    "disk": Case(1, "dense", "--update-weight-transport disk"),
}
"""Weights go by NCCL where servers have GPUs of their own, and by CUDA IPC where they share training's (`shared`, which
divides experts over its trainer, and `draft`, whose draft layer is not trained but loaded at every comparison)."""
CASE_SERVER = SERVER | {
    "mem-fraction-static": "0.2",
    "max-total-tokens": "32768",
    "cuda-graph-bs": "1 2 4 8 16",
    "max-running-requests": "64",
    "disable-custom-all-reduce": "",
    "enforce-disable-flashinfer-allreduce-fusion": "",
}
"""`--sglang-*` of every case. The last two turn off what not every machine has: NVLink multicast, and FlashInfer."""
CASE = (
    "--params-dtype bfloat16 --input-key prompt --label-key label --apply-chat-template --num-rollout 4 "
    "--rollout-batch-size 8 --n-samples-per-prompt 8 --rollout-max-response-len 40 --lr 1e-3 "
    "--lr-decay-style constant --use-dynamic-batch-size --max-tokens-per-gpu 8192 --rollout-engine sglang "
    "--check-weight-update-equal"
)
"""Options of every case."""
NOTING = (
    "import logging, runpy; logging.basicConfig(); logging.getLogger('lockstep').setLevel('INFO'); "
    "runpy.run_module('lockstep', run_name='__main__', alter_sys=True)"
)
"""`python -m lockstep`, which says how long each update took."""


def make_weights(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights by HF name, with those of a draft layer for a hybrid."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        parameters = list(build_model(read_model_config(config)).named_parameters())
    shapes = {hf.name: p[hf.index].shape for name, p in parameters for hf in hf_tensors(name, p.shape)}
    is_hybrid = "full_attention_interval" in config
    if is_hybrid:
        shapes |= draft_shapes(shapes, config)

    def vector(name: str) -> float:
        return float(not is_hybrid or "linear_attn.norm" in name)

    return {
        name: torch.full(shape, vector(name))
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        for name, shape in shapes.items()
    }


def draft_shapes(shapes: dict[str, torch.Size], config: dict[str, Any]) -> dict[str, torch.Size]:
    """A layer like the model's last, and what joins it to the model."""
    last, hidden = f"model.layers.{config['num_hidden_layers'] - 1}.", config["hidden_size"]
    layer = {name.replace(last, "mtp.layers.0."): shape for name, shape in shapes.items() if name.startswith(last)}
    norms = {
        f"mtp.{name}.weight": torch.Size([hidden]) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    }
    return layer | norms | {"mtp.fc.weight": torch.Size([hidden, 2 * hidden])}


def write_model(folder: Path, shape: dict[str, Any]) -> None:
    """Over the quickstart's model, whose tokenizer stays."""
    config = quickstart.make_config() | shape
    if not config["model_type"].endswith(("moe", "next")):
        config = {
            name: value for name, value in config.items() if not re.search("exp|moe_|sparse|mlp_|rout|topk", name)
        }
    quickstart.write_json(folder / "config.json", config)
    save_file(make_weights(config), folder / "model.safetensors", metadata={"format": "pt"})


async def digits(args: Any, sample: Sample) -> float:
    """The reward of a case, which tells samples of a random model apart: the share of digits."""
    response: str = sample.response
    return sum(c.isdigit() for c in response) / max(1, len(response))


def train(*words: str) -> int:
    return subprocess.run([sys.executable, "-m", "lockstep", "train", *words], check=False).returncode


def warm_up(output: Path, num_rollout: str) -> int:
    data = output / "data"
    quickstart.prepare(data, 0)
    write_model(data / "model", SHAPE)
    return train(
        str(QUICKSTART / "sft.toml"), "--hf-checkpoint", str(data / "model"),
        "--prompt-data", str(data / "sft.jsonl"), "--save-hf", str(output / "hf"),
        "--save", str(output / "sft" / "checkpoints"), "--run-dir", str(output / "sft"),
        "--num-rollout", num_rollout,
    )  # fmt: skip


def server_options(server: dict[str, str]) -> list[str]:
    return [word for name, value in server.items() for word in (f"--sglang-{name}", *value.split())]


def run(output: Path, result: Path, options: list[str]) -> int:
    run_dir = output / "grpo"
    words = [
        str(QUICKSTART / "grpo.toml"), "--hf-checkpoint", str(output / "hf"),
        "--prompt-data", str(output / "data" / "train.jsonl"),
        "--eval-prompt-data", "heldout", str(output / "data" / "heldout.jsonl"),
        "--params-dtype", "bfloat16", "--rollout-engine", "sglang", "--run-dir", str(run_dir),
        "--max-tokens-per-gpu", "32768", "--num-rollout", "30", "--lr", "1e-4", "--eval-interval", "1000",
        "--save", str(output / "grpo-checkpoints"), "--save-interval", "1000", *server_options(SERVER), *options,
    ]  # fmt: skip
    code, found = measured(words, run_dir, None)
    sys.stderr.write("\n".join(found["log"]))
    result.write_text(json.dumps(found))
    return code


def run_case(name: str, output: Path, result: Path, limit_s: float, options: list[str]) -> int:
    case, folder = CASES[name], output / name
    if torch.cuda.device_count() < case.num_gpus:
        print(f"{name} takes {case.num_gpus} GPUs; PyTorch sees {torch.cuda.device_count()}.", file=sys.stderr)
        return 2
    quickstart.make_checkpoint(folder / "model", 0)
    write_model(folder / "model", MODELS[case.model])
    quickstart.write_rows(folder / "train.jsonl", quickstart.make_prompt_rows("train", 256, 0))
    words = [
        "--hf-checkpoint", str(folder / "model"), "--prompt-data", str(folder / "train.jsonl"),
        "--run-dir", str(folder / "run"), "--custom-rm-path", f"{Path(__file__).resolve()}:digits",
        *CASE.split(), *server_options(CASE_SERVER), *case.options.split(), *options,
    ]  # fmt: skip
    code, found = measured(words, folder / "run", limit_s)
    logs = [folder / "run" / "lockstep.log", *sorted(folder.glob("run/sglang/server-*.log"))]
    server = "".join(log.read_text(errors="replace") for log in logs[1:2])
    missing = [argument for argument in case.arrived if f" {argument}," not in server]
    accepted = [float(length) for length in re.findall(r"accept len: ([\d.]+)", server)]
    ends = {log.name: log.read_text(errors="replace").splitlines()[-40:] for log in logs} if code else {}
    told = {"case": name, "exit_code": code, "arguments_missing": missing, "accept_len": accepted, "ends": ends}
    result.write_text(json.dumps(told | found))
    shown = ("num_steps", "seconds", "logprob_abs_diff", "routing_flips", "sent_s")
    print(name, f"exit code {code}, missing {missing},", {key: found[key] for key in shown}, flush=True)
    for log, lines in ends.items():
        print(f"{name}: the end of {log}", *lines, sep="\n", flush=True)
    return code or len(missing)


def measured(words: list[str], run_dir: Path, limit_s: float | None) -> tuple[int, dict[str, Any]]:
    """`lockstep train` with these words: its exit code, 124 when it was killed after its time, and what it shows."""
    started = time.perf_counter()
    run_dir.mkdir(parents=True, exist_ok=True)
    log = run_dir / "lockstep.log"
    with gpu_memory() as memory, log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", NOTING, "train", *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            servers = psutil.Process(process.pid).children(recursive=True)  # a server that starts may leave some behind
            os.killpg(process.pid, signal.SIGKILL)
            for server in servers:
                with suppress(psutil.NoSuchProcess):
                    server.kill()
            process.wait()
            code = 124
    text = log.read_text(errors="replace")
    return code, summary(run_dir, text, words) | {"seconds": time.perf_counter() - started, "memory_gib": memory}


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


def summary(run_dir: Path, log: str, words: list[str]) -> dict[str, Any]:
    """What the run is for, and all metrics."""
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    steps = [row for row in rows if row["step"] >= 0]
    updates = [row["perf/update_weights_time"] for row in steps if "perf/update_weights_time" in row]
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "torch": torch.__version__,
        "command": " ".join(["lockstep train", *words]),
        "num_steps": len(steps),
        "heldout": [row["eval/heldout"] for row in rows if "eval/heldout" in row],
        "reward": [row.get("rollout/raw_reward") for row in steps],
        "logprob_abs_diff": [row.get("train/train_rollout_logprob_abs_diff") for row in steps],
        "routing_flips": [row.get("train/routing_flips") for row in steps],
        "grad_norm": [row.get("train/grad_norm") for row in steps],
        "sent_s": [float(seconds) for seconds in re.findall(r"weights \S+ sent to \d+ servers in ([\d.]+) s", log)],
        "update_weights_s": updates,
        "rollout_s": [row.get("perf/rollout_time") for row in steps],
        "log": log.splitlines()[-60:],
        "server_log": [line for path in sorted(run_dir.glob("sglang/server-*.log")) for line in server_log(path)],
        "rows": rows,
    }


def server_log(path: Path) -> list[str]:
    """What the server says of starting, of its memory and of weights; all of it where it has not started."""
    lines = path.read_text(errors="replace").splitlines()
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
    third = commands.add_parser("case")
    third.add_argument("name", choices=CASES)
    third.add_argument("output", type=Path)
    third.add_argument("result", type=Path)
    third.add_argument("--limit-s", type=float, default=240.0, help="after which all of it is killed")
    options, rest = parser.parse_known_args()
    if options.command == "warm-up":
        return warm_up(options.output, options.num_rollout)
    if options.command == "case":
        return run_case(options.name, options.output, options.result, options.limit_s, rest)
    return run(options.output, options.result, rest)


if __name__ == "__main__":
    sys.exit(main())
