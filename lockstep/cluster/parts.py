"""What one process and each of several ranks build alike, from the options."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

from lockstep.algorithms import loss_from_options
from lockstep.checkpoint.hf import FillWeights, fill_with_dummies, load_hf_weights
from lockstep.config import Config
from lockstep.data import load_tokenizer
from lockstep.errors import OptionError
from lockstep.models import LanguageModel, ModelConfig
from lockstep.parallel.decode import Peers
from lockstep.parallel.mesh import Layout
from lockstep.rollout.embedded import EmbeddedEngine
from lockstep.rollout.embedded.caches import bytes_of_states, bytes_per_token

_PREFILL_TOKENS = 16384
"""Tokens of prompts that are computed at once: enough to keep a GPU busy."""

_KV_FRACTION = 0.3
"""Share of the free memory that the KV cache may take when neither option sets it."""

_SMALL_STATES = 2**30
"""Bytes of recurrent states that nobody need save."""


def pick_device(config: Config) -> torch.device:
    """The device that `--device` means.

    Raises:
        OptionError: a GPU is asked for and there is none, or there are fewer than ranks.
    """
    wanted, num_ranks = config.cluster.device, config.cluster.actor_num_gpus_per_node
    if config.cluster.has_replicas(config.rollout.rollout_engine):
        num_ranks += config.cluster.rollout_num_gpus or 0
    if wanted == "cuda" and not torch.cuda.is_available():
        raise OptionError(
            "--device", "cuda", "PyTorch sees no GPU here.", "Use --device cpu, or install a CUDA build of PyTorch."
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if num_ranks > torch.cuda.device_count():
        raise OptionError(
            "--actor-num-gpus-per-node (with --rollout-num-gpus)",
            num_ranks,
            f"PyTorch sees {torch.cuda.device_count()} GPUs here.",
            "Use at most as many, or --device cpu for processes without GPUs.",
        )
    return torch.device("cuda")


def layout_of(config: Config) -> Layout:
    """How the ranks of the options share the work."""
    options = config.parallel
    return Layout(
        world_size=config.cluster.num_ranks,
        tp_size=options.tensor_model_parallel_size,
        cp_size=options.context_parallel_size,
        pp_size=options.pipeline_model_parallel_size,
        ep_size=options.expert_model_parallel_size,
        etp_size=options.expert_tensor_parallel_size,
        decoder_first_pipeline_num_layers=options.decoder_first_pipeline_num_layers,
        decoder_last_pipeline_num_layers=options.decoder_last_pipeline_num_layers,
    )


def trainer_options(config: Config, num_steps: int) -> dict[str, Any]:
    """The arguments that every training engine takes, but for models and progress."""
    algorithm = config.algorithm
    is_sft = algorithm.loss_type == "sft_loss"
    routing = "old" if algorithm.use_routing_replay else "own"
    return {
        "loss": loss_from_options(algorithm),
        "optimizer": config.optimizer,
        "batching": config.batching,
        "temperature": 1.0 if is_sft else config.rollout.rollout_temperature,
        "needs_entropy": not is_sft,
        "routing": "rollout" if algorithm.use_rollout_routing_replay else routing,
        "num_steps": num_steps,
    }


def weights_filler(config: Config) -> FillWeights:
    """What fills a model: `--load-format`."""
    return fill_with_dummies if config.model.load_format == "dummy" else load_hf_weights


def reference_folder(config: Config) -> Path | None:
    """Where the frozen model of the KL loss is, if there is one."""
    if not config.algorithm.use_kl_loss:
        return None
    return Path(config.checkpoint.ref_load or config.model.hf_checkpoint)


def num_engines(config: Config) -> int:
    """Embedded engines that share the work of a rollout: replicas, or one in every rank."""
    return config.cluster.rollout_num_gpus or config.cluster.num_ranks


def cache_bytes(config: Config, device: torch.device, *, reserved: int) -> int:
    """Memory that the KV cache of one process may take: a share of what is free on a GPU but for `reserved` bytes, or
    in the machine, which all processes share."""
    if device.type == "cuda":
        fraction = config.sglang.mem_fraction_static or _KV_FRACTION
        return int(max(0, torch.cuda.mem_get_info(device)[0] - reserved) * fraction)
    return int(psutil.virtual_memory().available * _KV_FRACTION / config.cluster.actor_num_gpus_per_node)


def kv_tokens(config: Config, model: ModelConfig, *, element_size: int, num_bytes: int, longest: int) -> int:
    """Tokens of one process's KV cache: the option, else what the running requests can need, within `num_bytes`.

    Args:
        longest: tokens that one prompt with its response may need.
    """
    options = config.rollout
    if options.rollout_max_tokens is not None:
        return options.rollout_max_tokens
    per_token, most = bytes_per_token(model, element_size), options.rollout_max_running_requests
    affordable = max(0, num_bytes - bytes_of_states(model, element_size, most)) // per_token
    if running_requests(config, model, element_size=element_size, num_tokens=affordable, longest=longest) < most:
        affordable = int(num_bytes / (per_token + bytes_of_states(model, element_size, most) / most * 2 / longest))
    num_samples = -(-options.samples_per_rollout // num_engines(config))
    running = min(options.rollout_max_running_requests, max(num_samples, 1))
    return max(options.rollout_block_size, min(affordable, running * longest))


def running_requests(config: Config, model: ModelConfig, *, element_size: int, num_tokens: int, longest: int) -> int:
    """Most samples that the engine of one process decodes at a time: the option's number, but of models with large
    recurrent states, which are there for each of them, only as many as `num_tokens` hold at half of the full length."""
    most = config.rollout.rollout_max_running_requests
    if bytes_of_states(model, element_size, most) <= _SMALL_STATES:
        return most
    return max(1, min(most, 2 * num_tokens // longest))


def embedded_engine(
    config: Config, model: LanguageModel, num_tokens: int, max_context_len: int, peers: Peers | None = None
) -> EmbeddedEngine:
    """The sampler of one process, with a KV cache of `num_tokens`."""
    options = config.rollout
    return EmbeddedEngine(
        model,
        num_blocks=-(-num_tokens // options.rollout_block_size),
        block_size=options.rollout_block_size,
        max_running=running_requests(
            config,
            model.config,
            element_size=model.lm_head.weight.element_size(),
            num_tokens=num_tokens,
            longest=max_context_len,
        ),
        max_prefill_tokens=_prefill_tokens(config, max_context_len),
        decode_text=_decode_text(Path(config.model.hf_checkpoint)),
        seed=config.data.rollout_seed,
        peers=peers,
        graph_sizes=config.sglang.graph_sizes,
    )


def _prefill_tokens(config: Config, max_context_len: int) -> int:
    chunk = config.sglang.chunked_prefill_size
    if chunk == -1:
        return max(_PREFILL_TOKENS, max_context_len)
    return chunk or _PREFILL_TOKENS


def _decode_text(folder: Path) -> Callable[[list[int]], str]:
    """For stop strings: the tokenizer is loaded when the first one is asked for, which is never in most runs."""
    tokenizer = cache(lambda: load_tokenizer(folder))

    def decode(tokens: list[int]) -> str:
        text: str = tokenizer().decode(tokens, skip_special_tokens=False)
        return text

    return decode
