"""transformers' generate on the long tail of `decode_gpu.py`, static cache, with random weights of real size.

    python benchmarks/peer_transformers_gpu.py OUTPUT.json [qwen3-4b] [qwen3-30b-a3b]

512 requests are four batches of 128, each of which goes on until its longest response is done. Attention reads the
whole static cache at every step, so all steps take the same time: a stretch of them is timed, in a cache of the
batch's length, and multiplied by the steps of the four batches. Experts are computed by `grouped_mm`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from decode_gpu import SHAPES
from loads import long_tail
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, StaticCache

BATCH, PROMPT, STRETCH = 128, 128, 48


def main() -> None:
    output = Path(sys.argv[1])
    result: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
    for name in sys.argv[2:] or ["qwen3-4b", "qwen3-30b-a3b"]:
        try:
            result[name] = measure(random_model(name))
        except (RuntimeError, ValueError, TypeError) as error:
            result[name] = {"failed": repr(error)[:500]}
        print(name, json.dumps(result[name]), flush=True)
        output.write_text(json.dumps(result, indent=2) + "\n")
        torch.cuda.empty_cache()


def random_model(name: str) -> Any:
    shape = dict(SHAPES[name])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    config._attn_implementation = "sdpa"
    if hasattr(config, "num_experts"):
        config._experts_implementation = "grouped_mm"
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for part in type(model).__mro__:  # generate would leave grouped_mm in its steps
        for method in [a for a in vars(part) if "optimize_model_for_decode" in a]:
            setattr(model, method, lambda *_, **__: torch.no_grad())
    return model.eval()


@torch.no_grad()
def measure(model: Any) -> dict[str, Any]:
    prompts, lengths = long_tail()
    batches = [max(lengths[start : start + BATCH]) for start in range(0, len(lengths), BATCH)]
    room = PROMPT + max(batches)
    ids = torch.tensor(prompts[:BATCH], device="cuda")
    cache = StaticCache(config=model.config, max_cache_len=room)

    def seconds(new: int) -> float:
        cache.reset()
        options = GenerationConfig(
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            eos_token_id=None,
            pad_token_id=0,
        )
        torch.cuda.synchronize()
        started = time.perf_counter()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=options, past_key_values=cache)
        torch.cuda.synchronize()
        assert out.shape == (BATCH, PROMPT + new)
        return time.perf_counter() - started

    first = seconds(8 + STRETCH)  # compiles
    some, more = seconds(8), seconds(8 + STRETCH)
    step_s = (more - some) / STRETCH
    return {
        "batches_of_steps": batches,
        "cache_tokens": room,
        "step_ms": step_s * 1e3,
        "first_call_s": first,
        "computed_time_to_last_token_s": step_s * sum(batches) + 4 * (some - 8 * step_s),
    }


if __name__ == "__main__":
    main()
