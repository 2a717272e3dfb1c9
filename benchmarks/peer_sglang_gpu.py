"""SGLang's own engine with the loads of `decode_gpu.py`, in an environment that has SGLang:

    python benchmarks/peer_sglang_gpu.py CONFIG_FOLDER OUTPUT.json

CONFIG_FOLDER holds a `config.json`; weights are random ("dummy"). Attention is FA3 with pages of 64, the fastest that
was found; the prefix cache is on; graphs are captured for the batch sizes of the loads and some between them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from loads import long_tail, random_prompts

GRAPHS = [1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512]


def main() -> None:
    import sglang

    model, output = sys.argv[1], Path(sys.argv[2])
    started = time.perf_counter()
    engine = sglang.Engine(
        model_path=model, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", attention_backend="fa3",
        sampling_backend="pytorch", grammar_backend="none", page_size=64, max_running_requests=512,
        cuda_graph_max_bs_decode=512, cuda_graph_bs_decode=GRAPHS, cuda_graph_backend_prefill="disabled",
        mem_fraction_static=0.85, random_seed=0, log_level="warning",
    )  # fmt: skip
    result: dict[str, Any] = {"sglang": sglang.__version__, "start_s": time.perf_counter() - started, "short": {}}

    def serve(prompts: list[list[int]], lengths: list[int]) -> float:
        started = time.perf_counter()
        params = [{"temperature": 1.0, "max_new_tokens": length, "ignore_eos": True} for length in lengths]
        answers = engine.generate(input_ids=prompts, sampling_params=params)
        seconds = time.perf_counter() - started
        assert [answer["meta_info"]["completion_tokens"] for answer in answers] == lengths
        return seconds

    def note(name: str, value: Any) -> None:
        print(name, json.dumps(value), flush=True)
        output.write_text(json.dumps(result, indent=2) + "\n")

    prompts, lengths = long_tail()
    serve(prompts, [8] * 512)
    for batch in (1, 32, 128, 256, 512):
        prompts_short = random_prompts(batch, 128)
        serve(prompts_short, [8] * batch)
        engine.flush_cache()
        seconds = serve(prompts_short, [512] * batch)
        result["short"][str(batch)] = {"tokens_per_s": batch * 512 / seconds, "time_s": seconds}
        note(f"short {batch}", result["short"][str(batch)])
    engine.flush_cache()
    seconds = serve(prompts, lengths)
    result["tail"] = {"time_to_last_token_s": seconds, "tokens_per_s": sum(lengths) / seconds}
    note("tail", result["tail"])
    engine.shutdown()


if __name__ == "__main__":
    main()
