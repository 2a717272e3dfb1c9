"""Forward and backward of whole models beside `transformers` in the same run, random weights, on one GPU.

    python benchmarks/train_gpu.py OUTPUT.json [4b] [30b-a3b] [next-80b-a3b] [padding]

16,384 tokens in documents of 4,096 (8,192 without recomputing); the 30B-A3B geometry has 24 layers, Next-80B-A3B's 12.
Gradients add up in the parameters' `.grad` on both sides; no update is made. Model TFLOP/s count each product of
forward and backward once: recomputing is not counted. `padding` compares packed micro-batches with samples padded to
the longest, for lengths drawn from a log-normal distribution.
"""

from __future__ import annotations

import gc
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from layers_gpu import DOCUMENT, GEOMETRIES, VOCABULARY, layer_flops_per_token, random_model
from torch.utils.checkpoint import checkpoint

from lockstep.kernels.linear_log_probs import linear_log_probs
from lockstep.kernels.packed import PackedDocuments
from lockstep.models import LanguageModel, read_model_config
from lockstep.models.language_model import run_layer
from lockstep.trainer.batch import pack_by_tokens

LAYERS = {"4b": 36, "30b-a3b": 24, "next-80b-a3b": 12}
REPEATS = 3
MICRO_BATCH = 16384
PADDING_LAYERS = 4


def main(output: Path, cases: list[str]) -> None:
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    for case in cases:
        result[case] = padding() if case == "padding" else beside_transformers(case)
        output.write_text(json.dumps(result, indent=2) + "\n")


def beside_transformers(name: str) -> dict[str, Any]:
    shape = GEOMETRIES[name] | {"vocab_size": VOCABULARY, "num_hidden_layers": LAYERS[name]}
    config = read_model_config(shape)
    flops = config.num_hidden_layers * layer_flops_per_token(config) + 6 * VOCABULARY * config.hidden_size
    found: dict[str, Any] = {"layers": LAYERS[name], "gflop_per_token": flops / 1e9}
    ways: list[tuple[str, int, str | None]] = [("full", 4, "full"), ("selective", 4, "selective")]
    if name == "4b":
        ways.append(("none", 2, None))
    if name != "next-80b-a3b":
        model = transformers_model(shape)
        for way, documents, recompute in ways:
            if way != "selective":
                step = partial(transformers_step, model, documents, recompute is not None)
                found[f"transformers {way}"] = timed(step, documents * DOCUMENT, flops)
                print(name, "transformers", way, found[f"transformers {way}"], flush=True)
        del model, step
        give_back()
    ours = random_model(config)
    for way, documents, recompute in ways:
        step = partial(our_step, ours, [DOCUMENT] * documents, recompute)
        found[f"lockstep {way}"] = timed(step, documents * DOCUMENT, flops)
        print(name, "lockstep", way, found[f"lockstep {way}"], flush=True)
    del ours, step
    give_back()
    return found


def our_step(model: LanguageModel, lengths: list[int], recompute: str | None) -> None:
    device = torch.device("cuda")
    documents = PackedDocuments(lengths, device, keeps_attention=recompute == "selective")
    positions_T = torch.cat([torch.arange(length) for length in lengths]).to(device)
    ids_T = torch.randint(0, VOCABULARY, positions_T.shape, device=device)
    run = run_layer if recompute is None else partial(checkpoint, use_reentrant=False)
    hidden_TD = model(ids_T, positions_T, documents, run_layer=run)
    log_probs_R = linear_log_probs(hidden_TD, model.lm_head.weight, ids_T.roll(-1), with_entropy=False)[0]
    (-log_probs_R.mean()).backward()


def transformers_model(shape: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {key: value for key, value in shape.items() if key != "model_type"}
    config = AutoConfig.for_model(shape["model_type"], **given, max_position_embeddings=DOCUMENT)
    options = {"experts_implementation": "grouped_mm"} if shape.get("num_experts") else {}
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa", **options)
    return model.train()


def transformers_step(model: Any, documents: int, recompute: bool) -> None:
    model.gradient_checkpointing_enable() if recompute else model.gradient_checkpointing_disable()
    ids_BT = torch.randint(0, VOCABULARY, (documents, DOCUMENT), device=model.device)
    model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()


def timed(step: Callable[[], None], tokens: int, flops_per_token: float) -> dict[str, float]:
    """The fastest of some steps, after one."""
    times = []
    torch.cuda.reset_peak_memory_stats()
    for number in range(REPEATS + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if number:
            times.append(time.perf_counter() - start)
    return {
        "seconds": min(times),
        "slowest_seconds": max(times),
        "tokens_per_s": tokens / min(times),
        "model_tflops": flops_per_token * tokens / min(times) / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def padding() -> dict[str, Any]:
    """64 samples of a log-normal length, median 1,000 tokens, sigma 0.7, at most 4,096: packed, and padded to the
    longest and cut into micro-batches of as many samples as fit."""
    draw = torch.Generator().manual_seed(0)
    lengths = [min(DOCUMENT, round(math.exp(x))) for x in torch.normal(math.log(1000), 0.7, (64,), generator=draw)]
    longest = max(lengths)
    packs = [[lengths[i] for i in members] for members in pack_by_tokens(lengths, MICRO_BATCH)]
    together = MICRO_BATCH // longest
    padded = [[longest] * len(lengths[i : i + together]) for i in range(0, len(lengths), together)]
    shape = GEOMETRIES["4b"] | {"vocab_size": VOCABULARY, "num_hidden_layers": PADDING_LAYERS}
    model = random_model(read_model_config(shape))
    seconds = {
        name: timed(partial(all_of, model, batches), sum(lengths), 0.0)["seconds"]
        for name, batches in (("packed", packs), ("padded", padded))
    }
    factor = sum(map(sum, padded)) / sum(lengths)
    found = {
        "samples": len(lengths),
        "tokens": sum(lengths),
        "longest": longest,
        "micro_batches": [len(packs), len(padded)],
        "padding_factor": factor,
        "seconds": seconds,
        "speedup": seconds["padded"] / seconds["packed"],
        "of_the_padding_factor": seconds["padded"] / seconds["packed"] / factor,
    }
    print("padding", found, flush=True)
    del model
    give_back()
    return found


def all_of(model: LanguageModel, batches: list[list[int]]) -> None:
    for lengths in batches:
        our_step(model, lengths, "full")


def give_back() -> None:
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or [*LAYERS, "padding"])
