"""`lockstep bench loop`: sampling against transformers' generate, packed against padded training, in one run.

Both halves use one tiny Qwen3-MoE with random weights and 64 responses of log-normal length (mean 64, cap 256): a
static batch waits for its longest response, and padding costs what the lengths differ.
"""

from __future__ import annotations

import asyncio
import json
import platform
import subprocess
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from lockstep.algorithms import SftLoss
from lockstep.config import BatchingOptions, OptimizerOptions
from lockstep.models import Qwen3, Qwen3Config
from lockstep.rollout.embedded import EmbeddedEngine
from lockstep.rollout.engine import SamplingParams
from lockstep.trainer.batch import TrainSample
from lockstep.trainer.local import LocalTrainer

NUM_REQUESTS, PROMPT_TOKENS, MEAN_TOKENS, CAP_TOKENS = 64, 32, 64, 256
REPEATS = 3
EXPERT_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
HF_CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 1024,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def main(output: Path | None) -> None:
    """Measure, print a table, and write the result as JSON."""
    lengths = response_lengths()
    model = _random_model()
    sampling = bench_sampling(model, lengths)
    training = bench_training(model, lengths)
    result = {"machine": machine(), "sampling": sampling, "training": training}
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{'':34}{'tokens/s':>10}")
    print(f"{'sampling, embedded engine':34}{sampling['embedded_tokens_per_s']:>10,.0f}")
    for name, value in sampling["transformers_tokens_per_s"].items():
        print(f"{'sampling, transformers ' + name:34}{value:>10,.0f}")
    print(f"{'training, packed':34}{training['packed_tokens_per_s']:>10,.0f}")
    print(f"{'training, padded':34}{training['padded_tokens_per_s']:>10,.0f}")
    print(f"sampling: {sampling['speedup']:.2f}x the fastest transformers generate (goal 5)")
    print(
        f"training: {training['speedup']:.2f}x padded, {training['share_of_padding_factor']:.2f} of the padding factor "
        f"{training['padding_factor']:.2f} (goal 0.9)"
    )


def response_lengths() -> list[int]:
    """Lengths of the responses: log-normal (sigma 1), capped, with this mean after the cap; the same in every run."""
    drawn = np.random.default_rng(0).lognormal(sigma=1.0, size=NUM_REQUESTS)
    scale = MEAN_TOKENS / drawn.mean()
    for _ in range(20):
        scale *= MEAN_TOKENS / np.clip(drawn * scale, 1, CAP_TOKENS).mean()
    return [int(n) for n in np.clip(drawn * scale, 1, CAP_TOKENS).round()]


def bench_sampling(model: Qwen3, lengths: list[int]) -> dict[str, Any]:
    """Response tokens per second, prefill included, all requests at once."""
    prompts = np.random.default_rng(1).integers(0, model.config.vocab_size, (NUM_REQUESTS, PROMPT_TOKENS)).tolist()
    engine = EmbeddedEngine(
        model,
        num_blocks=2048,
        block_size=16,
        max_running=NUM_REQUESTS,
        max_prefill_tokens=8192,
        decode_text=lambda _: "",
        seed=0,
    )

    async def sample_all() -> None:
        requests = [
            engine.generate(prompt, SamplingParams(max_new_tokens=length), (0, i))
            for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        ]
        responses = await asyncio.gather(*requests)
        assert [len(r.token_ids) for r in responses] == lengths

    def embedded() -> None:
        asyncio.run(sample_all())
        engine.set_version(engine.version + 1)

    ours = sum(lengths) / _best_time(embedded)
    engine.close()
    peers = {
        name: sum(lengths) / _best_time(_transformers_generate(model, prompts, max(lengths), name))
        for name in EXPERT_IMPLEMENTATIONS
    }
    return {
        "requests": NUM_REQUESTS,
        "response_tokens": sum(lengths),
        "longest": max(lengths),
        "embedded_tokens_per_s": ours,
        "transformers_tokens_per_s": peers,
        "speedup": ours / max(peers.values()),
    }


def bench_training(model: Qwen3, lengths: list[int]) -> dict[str, Any]:
    """Real tokens per second of forward, backward and update: packed rows against rows padded to the longest."""
    rng = np.random.default_rng(2)
    full = [rng.integers(0, model.config.vocab_size, PROMPT_TOKENS + n).tolist() for n in lengths]
    longest = max(map(len, full))
    num_tokens = sum(map(len, full))
    packed = [_train_sample(tokens, 0, num_tokens) for tokens in full]
    padded = [_train_sample(tokens, longest - len(tokens), num_tokens) for tokens in full]
    trainer = LocalTrainer(
        model,
        reference=None,
        loss=SftLoss(),
        optimizer=OptimizerOptions(lr=0.0),
        batching=BatchingOptions(use_dynamic_batch_size=True, max_tokens_per_gpu=8192),
        temperature=1.0,
        needs_entropy=False,
        routing="own",
        num_steps=1,
    )
    seconds = {name: _best_time(partial(trainer.step, s)) for name, s in (("packed", packed), ("padded", padded))}
    factor = longest * len(full) / num_tokens
    speedup = seconds["padded"] / seconds["packed"]
    return {
        "tokens": num_tokens,
        "packed_tokens_per_s": num_tokens / seconds["packed"],
        "padded_tokens_per_s": num_tokens / seconds["padded"],
        "speedup": speedup,
        "padding_factor": factor,
        "share_of_padding_factor": speedup / factor,
    }


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "command": "lockstep bench loop",
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=True),
        "threads": torch.get_num_threads(),
        "load_average": psutil.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def _random_model() -> Qwen3:
    generator = torch.Generator().manual_seed(0)
    model = Qwen3(Qwen3Config.from_hf(HF_CONFIG))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return model


def _transformers_generate(model: Qwen3, prompts: list[list[int]], longest: int, experts: str) -> Callable[[], None]:
    """A static batch that runs until its longest response is done, with the same weights."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, logging

    logging.set_verbosity_error()
    fields = {name: value for name, value in HF_CONFIG.items() if name != "model_type"}
    peer = Qwen3MoeForCausalLM(Qwen3MoeConfig(**fields)).eval()
    peer.load_state_dict(model.state_dict())
    peer.set_experts_implementation(experts)
    inputs = torch.tensor(prompts)

    def generate() -> None:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            tokens = peer.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=True,
                max_new_tokens=longest,
                min_new_tokens=longest,
                pad_token_id=0,
            )
        assert tokens.shape[1] == PROMPT_TOKENS + longest

    return generate


def _train_sample(tokens: list[int], padding: int, num_tokens: int) -> TrainSample:
    response = len(tokens) - PROMPT_TOKENS
    return TrainSample(
        tokens=tokens + [0] * padding,
        response_length=response + padding,
        loss_mask=[1] * response + [0] * padding,
        loss_weight=1 / num_tokens,
    )


def _best_time(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of some repeats, after one to warm up."""
    run()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
