"""`lockstep serve`: a model behind OpenAI's protocol, for looking at it."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lockstep.assemble import stop_token_ids
from lockstep.checkpoint.hf import load_hf_model, read_hf_config
from lockstep.checkpoint.tensors import load_tensors
from lockstep.checkpoint.training import find_checkpoint, read_state
from lockstep.cluster.parts import cache_bytes, embedded_engine, kv_tokens, pick_device
from lockstep.config import Config
from lockstep.data import load_tokenizer
from lockstep.errors import CheckpointError
from lockstep.models import LanguageModel, build_model, read_model_config
from lockstep.rollout.endpoint import Endpoint, GatedEngine, ServedPolicy, listen
from lockstep.rollout.endpoint.requests import Limits
from lockstep.tracking.transfer import TransferProgress


@dataclass(frozen=True)
class ServedFolder:
    """Where a model comes from: an HF folder, with the weights of a training checkpoint in place of its own or not."""

    hf_folder: Path
    checkpoint: Path | None = None

    @classmethod
    def find(cls, path: Path) -> ServedFolder:
        """
        Raises:
            CheckpointError: there is neither a model nor a checkpoint.
        """
        if (path / "config.json").is_file():
            return cls(path)
        found = find_checkpoint(path) if path.is_dir() else None
        if found is None:
            raise CheckpointError(
                "CHECKPOINT",
                str(path),
                "there is no model.",
                "Give a folder in HF format, the --save folder of a run, or one of its checkpoints.",
            )
        options = tomllib.loads((found / "config.toml").read_text())
        return cls(Path(options["model"]["hf_checkpoint"]), found)

    @property
    def version(self) -> int:
        return 0 if self.checkpoint is None else int(read_state(self.checkpoint)["trainer"]["version"])

    def load(self, dtype: torch.dtype, device: torch.device) -> LanguageModel:
        if self.checkpoint is None:
            with TransferProgress("loading") as progress:
                return load_hf_model(self.hf_folder, dtype=dtype, device=device, on_bytes=progress)
        with torch.device("meta"):
            model = build_model(read_model_config(read_hf_config(self.hf_folder))).to(dtype)
        model.to_empty(device=device)
        model.tie_weights()
        load_tensors(self.checkpoint, {f"model.{name}": p.detach() for name, p in model.named_parameters()})
        return model


def serve(path: Path, host: str, port: int, read_config: Callable[[Sequence[str]], Config | None]) -> int:
    """Run `lockstep serve` until it is interrupted; returns the exit code.

    Args:
        read_config: makes options of words, None when showing them was all that was asked for.
    """
    folder = ServedFolder.find(path)
    if (config := read_config(["--hf-checkpoint", str(folder.hf_folder)])) is None:
        return 0
    with listen(host, port, "--port") as listener:
        asyncio.run(_serve(folder, config, listener))
    return 0


async def _serve(folder: ServedFolder, config: Config, listener: socket.socket) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    device = pick_device(config)
    tokenizer: Any = load_tokenizer(folder.hf_folder)
    model = folder.load(getattr(torch, config.model.params_dtype), device)
    longest = config.rollout.rollout_max_context_len or model.config.max_position_embeddings
    num_tokens = kv_tokens(
        config,
        model.config,
        element_size=model.lm_head.weight.element_size(),
        num_bytes=cache_bytes(config, device, reserved=0),
        longest=longest,
    )
    engine = GatedEngine(embedded_engine(config, model, num_tokens, min(longest, num_tokens)))
    engine.set_version(folder.version)
    limits = Limits(
        model=folder.hf_folder.resolve().name,
        tokenizer=tokenizer,
        defaults={"temperature": 1.0, "top_p": 1.0, "top_k": -1},
        stop_token_ids=stop_token_ids(folder.hf_folder, read_hf_config(folder.hf_folder), tokenizer),
        max_context_len=min(longest, num_tokens),
        vocab_size=model.config.vocab_size,
        chat_template_kwargs=config.data.apply_chat_template_kwargs,
    )
    policy = ServedPolicy(engine, limits, asyncio.get_running_loop())
    endpoint = Endpoint(policy, listener)
    print(f"serving {folder.checkpoint or folder.hf_folder} at {endpoint.url} (Ctrl-C stops)", flush=True)
    print(f"try: {_example(endpoint.url, limits)}", flush=True)
    try:
        await stop.wait()
    finally:
        await asyncio.to_thread(endpoint.close)
        await engine.drain()
        engine.close()
    print("stopped", flush=True)


def _example(url: str, limits: Limits) -> str:
    body: dict[str, Any] = {"model": limits.model}
    if limits.tokenizer.chat_template:
        path, body["messages"] = "chat/completions", [{"role": "user", "content": "How are you?"}]
    else:
        path, body["prompt"] = "completions", "Once upon a time"
    return f"curl {url}/v1/{path} -H 'content-type: application/json' -d '{json.dumps(body | {'max_tokens': 64})}'"
