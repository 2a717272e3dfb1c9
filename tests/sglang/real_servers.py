"""A real SGLang server on the CPU, and tiny models for it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from lockstep.checkpoint.hf import load_hf_model, save_hf_model
from lockstep.kernels.packed import PackedDocuments
from lockstep.models import LanguageModel
from lockstep.models.layers.moe import ChooseExperts, RecordRoutes, top_k_experts
from lockstep.rollout.engine import Generation, SamplingParams
from lockstep.rollout.sglang import SGLangEngine, server_words
from lockstep.rollout.sglang.fleet import ServerFleet, ServerPlan
from lockstep.rollout.sglang.process import LocalServers
from lockstep.weight_sync import Transport, WeightSource

HERE = Path(__file__).parent
PYTHON = HERE / "server_python"
INSTALLED = (HERE.parents[1] / ".venv-sglang" / "installed").is_file()

START_S = 900.0
"""A start takes 13 s on two idle cores, and took 120 s on busy ones."""
PATIENCE_S = 60.0
"""For a sign of life of a server that is well."""

CPU_ARGS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_overlap_schedule": True,
    "disable_cuda_graph": True,
    "skip_server_warmup": True,
    "sleep_on_idle": True,
    "max_total_tokens": 4096,
    "max_running_requests": 8,
    "enable_return_routed_experts": True,
}
"""`--sglang-*` options for a machine without a GPU."""


def server_options(**changes: Any) -> dict[str, Any]:
    """Options for a real server on the CPU."""
    options = {"rollout_engine": "sglang", "sglang_python": PYTHON, "rollout_server_start_timeout": START_S}
    return options | {f"sglang_{name}": value for name, value in (CPU_ARGS | changes).items()}


def load(folder: Path) -> LanguageModel:
    return load_hf_model(folder, dtype=torch.float32, device=torch.device("cpu"))


def source_of(model: LanguageModel, hf_folder: Path) -> WeightSource:
    return WeightSource(
        export=lambda folder: save_hf_model(model, folder, source=hf_folder), model=lambda: nullcontext(model)
    )


def start_fleet(folder: Path, model: LanguageModel, transport: Transport, work: Path, **changes: Any) -> ServerFleet:
    plan = ServerPlan(
        python=str(PYTHON),
        words=server_words(CPU_ARGS, tp_size=1),
        num_servers=changes.pop("num_servers", 1),
        log_folder=work / "logs",
        places=LocalServers(gpus_per_server=1, first_gpu=None),
    )
    return ServerFleet(
        plan=plan,
        source=source_of(model, folder),
        transport=transport,
        hf_folder=folder,
        export_folder=work / "export",
        start_timeout_s=START_S,
        check_equal=False,
        health_timeout_s=PATIENCE_S,
        **changes,
    )


def engine_of(fleet: ServerFleet, **changes: Any) -> SGLangEngine:
    options = {
        "seed": 1,
        "routes_shape": (2, 2),
        "request_timeout_s": 300.0,
        "health_interval_s": 30.0,
        "health_timeout_s": PATIENCE_S,
    }
    return SGLangEngine(fleet, **(options | changes))


def ask(engine: SGLangEngine, prompts: Sequence[list[int]], **params: Any) -> list[Generation]:
    """All prompts at once."""

    async def all_of_them() -> list[Generation]:
        requests = (
            engine.generate(prompt, SamplingParams(**params), (0, 0, number, number))
            for number, prompt in enumerate(prompts)
        )
        try:
            return list(await asyncio.gather(*requests))
        finally:
            await engine.drain()

    return asyncio.run(asyncio.wait_for(all_of_them(), START_S))


@torch.no_grad()
def score(
    model: LanguageModel, prompt: list[int], response: list[int], choose: ChooseExperts = top_k_experts
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [response] and experts [tokens - 1, layers, top_k] of Lockstep's model for the same tokens."""
    tokens = torch.tensor(prompt + response)
    routes = RecordRoutes(choose)
    hidden_TD = model(tokens, torch.arange(len(tokens)), PackedDocuments([len(tokens)], tokens.device), routes)
    log_probs_TV = model.lm_head(hidden_TD).log_softmax(-1)
    rows = torch.arange(len(prompt) - 1, len(tokens) - 1)
    return log_probs_TV[rows, tokens[rows + 1]], routes.stacked()[:-1]
