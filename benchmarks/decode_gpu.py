"""The embedded engine on one GPU, with random weights of a model's real size.

    python benchmarks/decode_gpu.py OUTPUT.json [--models qwen3-30b-a3b qwen3-4b qwen3-next] [--layers N]
        [--parts decode profile prefill switch numerics short tail] [--batches 1 32 128 256 512]

decode: tokens per second at a context of 2k, beside what the bytes that a step must read would take at the copy rate of
this run (weights, with the experts that were really chosen, and the keys and values of the real context).
profile: shares of the GPU's time by kernel, and how long it had nothing to do.
prefill: 16k tokens. switch: handing the caches' memory over and back.
numerics: the sampler's log-probs against the trainer's.
short: prompts of 128 tokens, 512 new ones, prefill included.
tail: 512 requests in groups of 8 with log-normal lengths, mean 1k, cap 4k, until the last token.
`--layers` cuts the depth, for quick looks: such figures say so.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import gc
import json
import platform
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from loads import long_tail, random_prompts

from lockstep.kernels.packed import PackedDocuments
from lockstep.models import LanguageModel, ModelConfig, build_model, read_model_config
from lockstep.models.layers.moe import Experts
from lockstep.rollout.embedded import EmbeddedEngine
from lockstep.rollout.embedded.ahead import AheadRunner
from lockstep.rollout.embedded.caches import bytes_per_sequence, bytes_per_token
from lockstep.rollout.embedded.sequence import Sequence
from lockstep.rollout.engine import SamplingParams

CONTEXT = 2048
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-4b": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2560, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 9728,
        "tie_word_embeddings": True, "rope_theta": 1e6, "max_position_embeddings": 40960,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
        "rope_theta": 1e6, "max_position_embeddings": 40960,
    },
    "qwen3-next": {
        "model_type": "qwen3_next", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48,
        "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "intermediate_size": 5120,
        "num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512, "norm_topk_prob": True, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4, "rope_theta": 1e7, "partial_rotary_factor": 0.25,
        "max_position_embeddings": 262144,
    },
}  # fmt: skip
FITTING_LAYERS = {"qwen3-next": 24}
"""Depth that fits on one GPU, where the whole model does not."""


def main() -> None:
    options = parsed()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "ceilings": ceilings(),
    }
    print(json.dumps(result), flush=True)
    for name in options.models:
        layers = options.layers or FITTING_LAYERS.get(name) or SHAPES[name]["num_hidden_layers"]
        model = random_model(read_model_config(SHAPES[name] | {"num_hidden_layers": layers}))
        found: dict[str, Any] = {"layers": f"{layers} of {SHAPES[name]['num_hidden_layers']}"}
        result[name] = found
        for part in options.parts:
            started = time.perf_counter()
            try:
                found[part] = PARTS[part](model, options, result["ceilings"])
            except Exception as error:
                found[part] = {"failed": repr(error)[:500]}
                traceback.print_exc()
                if options.stops:
                    raise
            print(name, part, f"{time.perf_counter() - started:.0f} s", json.dumps(found[part]), flush=True)
            options.output.write_text(json.dumps(result, indent=2) + "\n")
            gc.collect()
            torch.cuda.empty_cache()
        del model
        gc.collect()
        torch.cuda.empty_cache()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["qwen3-30b-a3b", "qwen3-4b"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32, 128, 256, 512])
    parser.add_argument("--layers", type=int, help="cut the depth")
    parser.add_argument("--steps", type=int, default=24, help="timed steps of each batch")
    parser.add_argument("--stops", action="store_true", help="at the first failure")
    return parser.parse_args()


@torch.no_grad()
def random_model(config: ModelConfig) -> LanguageModel:
    with torch.device("meta"):
        model = build_model(config)
    model = model.to(torch.bfloat16).to_empty(device="cuda")
    model.tie_weights()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "dt_bias")) or ("norm" in name and parameter.dim() == 1):
            parameter.fill_(0.0 if config.num_delta_layers and "linear_attn.norm" not in name else 1.0)
        else:
            parameter.normal_(std=0.02)
    return model


def ceilings() -> dict[str, float]:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return {
        "matmul_tflops": 2 * 8192**3 / seconds(lambda: a @ b) / 1e12,
        "copy_tbytes_per_s": 2 * 2**32 / seconds(lambda: target.copy_(source)) / 1e12,
    }


def seconds(run: Callable[[], Any], repeats: int = 10) -> float:
    """Median of some timed runs after two to warm up."""
    times = []
    for i in range(repeats + 2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


@contextmanager
def engine_for(model: LanguageModel, *, tokens: int, running: int, **options: Any) -> Iterator[EmbeddedEngine]:
    """An engine whose cache holds so many tokens, or as many as fit beside 12 GiB."""
    per_token = bytes_per_token(model.config, 2)
    states = int(1.2 * running * bytes_per_sequence(model.config, 2))
    tokens = min(tokens, (torch.cuda.mem_get_info()[0] - 12 * 2**30 - states) // per_token)
    engine = EmbeddedEngine(
        model,
        num_blocks=tokens // 16,
        block_size=16,
        max_running=running,
        max_prefill_tokens=16384,
        decode_text=lambda _: "",
        seed=0,
        **options,
    )
    try:
        yield engine
    finally:
        engine.close()


# Decoding


def decode(model: LanguageModel, options: argparse.Namespace, limits: dict[str, float]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for batch in options.batches:
        room = batch * (CONTEXT + 16 * (options.steps + 20))
        if room * bytes_per_token(model.config, 2) > torch.cuda.mem_get_info()[0] - 14 * 2**30:
            found[str(batch)] = {"left_out": "the context does not fit"}
            continue
        with engine_for(model, tokens=room, running=batch) as engine:
            found[str(batch)] = decode_batch(engine, batch, options.steps, limits)
        print("decode", batch, json.dumps(found[str(batch)]), flush=True)
        del engine
        gc.collect()
        torch.cuda.empty_cache()
    return found


def decode_batch(engine: EmbeddedEngine, batch: int, steps: int, limits: dict[str, float]) -> dict[str, Any]:
    runner = engine.runner
    assert isinstance(runner, AheadRunner)
    sequences = [filled(engine, number, steps) for number in range(batch)]
    warm_up = 4
    started = time.perf_counter()
    for _ in range(warm_up):
        engine.step()
    torch.cuda.synchronize()
    first_s = time.perf_counter() - started
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - started)
    torch.cuda.synchronize()
    step = runner.steps.for_rows(batch)
    routes = None if step.routes_BLS is None else step.routes_BLS[:batch].cpu().numpy()
    context = sum(s.length for s in sequences) - batch * steps // 2
    must_read = bytes_of_a_step(runner.model, routes, context, batch)
    step_s = float(np.mean(times))
    return {
        "ms_per_step": step_s * 1e3,
        "tokens_per_s": batch / step_s,
        "gbytes_per_step": must_read / 1e9,
        "tbytes_per_s": must_read / step_s / 1e12,
        "share_of_roofline": must_read / step_s / 1e12 / limits["copy_tbytes_per_s"],
        "experts_hit_per_layer": None if routes is None else mean_hit(routes),
        "first_steps_s": first_s,
    }


def filled(engine: EmbeddedEngine, number: int, steps: int) -> Sequence:
    """A sequence that is running with a context of 2k, of which all but the last token count as computed."""
    draw = np.random.default_rng(number)
    sequence = engine.sequence(
        draw.integers(0, engine.runner.model.config.vocab_size, CONTEXT - steps // 2).tolist(),
        SamplingParams(max_new_tokens=4 * steps + 64),
        (0, 0, number, 0),
    )
    assert engine.blocks.allocate(sequence)
    sequence.num_computed_tokens = len(sequence.tokens) - 1
    engine.scheduler.running.append(sequence)
    if number == 0:
        engine.runner.caches.kv.normal_()
    # Not decoding yet, for the runner: one token after a context is a prefill, whose sampled token it feeds back.
    return sequence


def mean_hit(routes_BLS: np.ndarray) -> float:
    return float(np.mean([len(np.unique(routes_BLS[:, layer])) for layer in range(routes_BLS.shape[1])]))


def bytes_of_a_step(model: LanguageModel, routes_BLS: np.ndarray | None, context: int, batch: int) -> float:
    """Weights once, of experts only those that were chosen; keys and values; recurrent states read and written."""
    config = model.config
    experts = sum(p.numel() for module in model.modules() if isinstance(module, Experts) for p in module.parameters())
    others = sum(p.numel() for p in model.parameters()) - experts
    if not config.tie_word_embeddings:
        others -= model.model.embed_tokens.weight.numel()
    hit = 0.0
    if routes_BLS is not None:
        hit = mean_hit(routes_BLS) / config.num_experts
    states = 2 * batch * bytes_per_sequence(config, 2)
    return 2 * (others + hit * experts) + context * bytes_per_token(config, 2) + states


def profile(model: LanguageModel, options: argparse.Namespace, limits: dict[str, float]) -> dict[str, Any]:
    """Shares of the GPU's time by kernel while decoding, and the share in which it ran none."""
    found = {}
    for batch in (1, 128):
        with engine_for(model, tokens=batch * (CONTEXT + 16 * 40), running=batch) as engine:
            for number in range(batch):
                filled(engine, number, 12)
            for _ in range(4):
                engine.step()
            found[str(batch)] = profile_steps(engine)
        gc.collect()
        torch.cuda.empty_cache()
    return found


def profile_steps(engine: EmbeddedEngine, steps: int = 6) -> dict[str, Any]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    if not spans:
        return {}
    busy, end = 0.0, spans[0][0]
    for start, stop, _ in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    total: Counter[str] = Counter()
    for start, stop, name in spans:
        total[name[:60]] += stop - start
    whole = end - spans[0][0]
    return {
        "gpu_idle_share": 1 - busy / whole,
        "kernels_per_step": len(spans) / steps,
        "kernel_shares": {name: round(t / whole, 4) for name, t in total.most_common(14)},
    }


# Requests


def short(model: LanguageModel, options: argparse.Namespace, limits: dict[str, float]) -> dict[str, Any]:
    """As SGLang was measured: prompts of 128 tokens, 512 new ones, prefill included."""
    found = {}
    for batch in options.batches:
        with engine_for(model, tokens=batch * 656, running=batch) as engine:
            prompts = random_prompts(batch, 128)
            serve(engine, prompts, [8] * batch)  # kernels and the large graph
            engine.set_version(engine.version + 1)
            arrivals: list[float] = []
            time_s = serve(engine, prompts, [512] * batch, arrivals)
        found[str(batch)] = {
            "tokens_per_s": batch * 512 / time_s,
            "time_s": time_s,
            "last_first_token_s": arrivals[batch - 1],
            "ms_per_step": 1e3 * (arrivals[-1] - arrivals[batch - 1]) / 511,
        }
        gc.collect()
        torch.cuda.empty_cache()
    return found


def tail(model: LanguageModel, options: argparse.Namespace, limits: dict[str, float]) -> dict[str, Any]:
    prompts, lengths = long_tail()
    with engine_for(model, tokens=sum(lengths) + 512 * 160, running=512) as engine:
        cold_s = serve(engine, prompts, lengths)
        engine.set_version(engine.version + 1)
        time_s = serve(engine, prompts, lengths)
        preemptions = engine.scheduler.num_preemptions
    return {
        "requests": 512,
        "response_tokens": sum(lengths),
        "longest": max(lengths),
        "time_to_last_token_s": time_s,
        "first_time_with_capture_s": cold_s,
        "tokens_per_s": sum(lengths) / time_s,
        "preemptions": preemptions,
    }


def serve(
    engine: EmbeddedEngine, prompts: list[list[int]], lengths: list[int], arrivals: list[float] | None = None
) -> float:
    """Seconds to the last token; `arrivals` gets those to every token, in order."""
    on_token = None if arrivals is None else lambda *_: arrivals.append(time.perf_counter() - started)

    async def all_of_them() -> None:
        calls = [
            engine.generate(prompt, SamplingParams(max_new_tokens=length), (0, 0, number // 8, number % 8), on_token)
            for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        ]
        answers = await asyncio.gather(*calls)
        assert [len(answer.token_ids) for answer in answers] == lengths

    torch.cuda.synchronize()
    started = time.perf_counter()
    asyncio.run(all_of_them())
    return time.perf_counter() - started


# Prefill and the phase switch


def prefill(model: LanguageModel, options: argparse.Namespace, limits: dict[str, float]) -> dict[str, Any]:
    """16k tokens of four prompts, as one pass; attention counted as half a square."""
    config, times = model.config, []
    with engine_for(model, tokens=2 * 16384 + 256, running=8) as engine:
        for attempt in range(4):
            for number, prompt in enumerate(random_prompts(4, 4096)):
                engine.add(engine.sequence(prompt, SamplingParams(max_new_tokens=1), (0, attempt, number)))
            torch.cuda.synchronize()
            started = time.perf_counter()
            while engine.has_work:
                engine.step()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
            engine.set_version(attempt + 1)
    inner = config.num_attention_heads * config.head_dim * config.num_attention_layers
    flops = 2 * active_parameters(model) * 16384 + 2 * inner * 4096 * 16384
    rate = flops / min(times) / 1e12
    return {
        "ms": min(times) * 1e3,
        "tokens_per_s": 16384 / min(times),
        "tflops": rate,
        "share_of_matmul_rate": rate / limits["matmul_tflops"],
    }


def active_parameters(model: LanguageModel) -> float:
    """Numbers of the matrices that a token meets in the layers."""
    config, layers = model.config, model.model.layers
    experts = sum(p.numel() for module in layers.modules() if isinstance(module, Experts) for p in module.parameters())
    others = sum(p.numel() for p in layers.parameters() if p.dim() > 1) - experts
    return others + (experts * config.num_experts_per_tok / config.num_experts if config.num_experts else 0)


def switch(model: LanguageModel, options: argparse.Namespace, limits: dict[str, float]) -> dict[str, Any]:
    """Give the caches' memory back, fill it with something else, take it again; graphs and weights stay."""
    prompts = random_prompts(4, 64)
    with engine_for(model, tokens=10**9, running=64) as engine:
        memory = engine.runner.caches.memory
        before = serve_tokens(engine, prompts)
        addresses = [p.data_ptr() for p in model.parameters()]
        away, back = [], []
        for _ in range(3):
            engine.set_version(engine.version + 1)
            torch.cuda.synchronize()
            started = time.perf_counter()
            engine.release_memory()
            torch.cuda.synchronize()
            away.append(time.perf_counter() - started)
            free = torch.cuda.mem_get_info()[0]
            other = torch.empty(free - 4 * 2**30, dtype=torch.uint8, device="cuda").fill_(255)
            del other
            torch.cuda.synchronize()
            started = time.perf_counter()
            memory.hold()
            torch.cuda.synchronize()
            back.append(time.perf_counter() - started)
        after = serve_tokens(engine, prompts)
        num_bytes = len(memory.data)
    assert before == after, "the graphs must compute the same after the switch"
    assert addresses == [p.data_ptr() for p in model.parameters()], "no weight may move"
    return {"cache_gib": num_bytes / 2**30, "to_training_s": away, "to_rollout_s": back}


def serve_tokens(engine: EmbeddedEngine, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    async def all_of_them() -> list[tuple[list[int], list[float]]]:
        params = SamplingParams(max_new_tokens=24)
        answers = await asyncio.gather(*(engine.generate(p, params, (0, i)) for i, p in enumerate(prompts)))
        return [(answer.token_ids, answer.log_probs) for answer in answers]

    return asyncio.run(all_of_them())


# Numerics


@torch.no_grad()
def numerics(model: LanguageModel, options: argparse.Namespace, limits: dict[str, float]) -> dict[str, Any]:
    """|log-prob of the sampler - of the trainer| in bf16 with peaked logits, beside two floors: the trainer against
    itself under another packing, and, where there is room, both against the same weights in fp32. Routes are replayed
    in all."""
    from lockstep.kernels.linear_log_probs import linear_log_probs
    from lockstep.trainer.routes import choose_experts

    config = model.config
    own_head = model.lm_head.weight.clone()
    ids = torch.randint(0, config.vocab_size, (512,), device="cuda")
    scale = 1.0
    for _ in range(6):
        hidden = model(ids, torch.arange(512, device="cuda"), PackedDocuments([512], ids.device))
        entropy = linear_log_probs(hidden, model.lm_head.weight, ids)[1]
        assert entropy is not None
        if float(entropy.mean()) < 0.9:
            break
        scale *= 1.5
        model.lm_head.weight.copy_(own_head * scale)
    with engine_for(model, tokens=64 * 1024, running=64) as engine:
        prompts = random_prompts(48, 200)

        async def sample() -> list[Any]:
            params = SamplingParams(max_new_tokens=256)
            return list(await asyncio.gather(*(engine.generate(p, params, (0, i)) for i, p in enumerate(prompts))))

        answers = asyncio.run(sample())

    def trained(group: int, *, replays: bool, model: LanguageModel = model) -> tuple[torch.Tensor, int, float]:
        """Log-probs of all sampled tokens with so many samples in a pack; rows with other experts; the mean entropy."""
        found, flips, entropies = [], 0, []
        for start in range(0, len(answers), group):
            pack = list(zip(prompts, answers, strict=True))[start : start + group]
            tokens = [prompt + answer.token_ids for prompt, answer in pack]
            lengths = [len(t) for t in tokens]
            flat = torch.tensor([t for row in tokens for t in row], device="cuda")
            positions = torch.cat([torch.arange(n, device="cuda") for n in lengths])
            routes = None
            if config.num_sparse_layers:
                parts = [np.concatenate([a.routed_experts, np.full_like(a.routed_experts[:1], -1)]) for _, a in pack]
                routes = torch.from_numpy(np.concatenate(parts)).cuda()
            choose = choose_experts(routes, replays=replays)
            hidden = model(flat, positions, PackedDocuments(lengths, flat.device), choose)
            offset, rows = 0, []
            for (prompt, _), length in zip(pack, lengths, strict=True):
                rows.append(torch.arange(offset + len(prompt) - 1, offset + length - 1, device="cuda"))
                offset += length
            at = torch.cat(rows)
            log_probs, entropy = linear_log_probs(hidden[at], model.lm_head.weight, flat[at + 1])
            assert entropy is not None
            found.append(log_probs)
            entropies.append(float(entropy.mean()))
            if routes is not None:
                flips += int(choose.differs_T.sum())  # type: ignore[attr-defined]
        return torch.cat(found), flips, float(np.mean(entropies))

    sampled = torch.tensor([x for answer in answers for x in answer.log_probs], device="cuda")
    packed, replayed_flips, entropy_mean = trained(16, replays=True)
    alone, _, _ = trained(1, replays=True)
    own, flips, _ = trained(16, replays=False)
    against_fp32 = {}
    num_bytes = 4 * sum(p.numel() for p in model.parameters())
    if num_bytes < torch.cuda.mem_get_info()[0] // 2:
        wide = copy.deepcopy(model).float()
        exact, _, _ = trained(1, replays=True, model=wide)
        against_fp32 = {
            "sampler_against_fp32": float((sampled - exact).abs().mean()),
            "trainer_against_fp32": float((packed - exact).abs().mean()),
        }
        del wide
    model.lm_head.weight.copy_(own_head)
    mean = float((sampled - packed).abs().mean())
    floor = float((alone - packed).abs().mean())
    return {
        "tokens": len(sampled),
        "mean_entropy": entropy_mean,
        "mean_difference": mean,
        "mean_difference_one_sample_per_pack": float((sampled - alone).abs().mean()),
        "floor": floor,
        "times_the_floor": mean / floor if floor else None,
        "mean_difference_own_routes": float((sampled - own).abs().mean()),
        **against_fp32,
        "tokens_with_other_experts": flips,
        "tokens_with_other_experts_under_replay": replayed_flips,
    }


PARTS: dict[str, Callable[[LanguageModel, argparse.Namespace, dict[str, float]], dict[str, Any]]] = {
    "decode": decode,
    "profile": profile,
    "prefill": prefill,
    "switch": switch,
    "numerics": numerics,
    "short": short,
    "tail": tail,
}


if __name__ == "__main__":
    main()
