"""From the options to an engine with servers behind it."""

from __future__ import annotations

import os
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import urlsplit

import torch

from lockstep.config import Config
from lockstep.models import ModelConfig
from lockstep.rollout.sglang.arguments import known_flags, require_known, server_words
from lockstep.rollout.sglang.engine import SGLangEngine
from lockstep.rollout.sglang.fleet import ServerFleet, ServerPlan
from lockstep.trainer.engine import TrainingEngine
from lockstep.trainer.local import LocalTrainer
from lockstep.weight_sync import BroadcastTransport, DiskTransport, TensorTransport, Transport, WeightSource
from lockstep.weight_sync.broadcast import own_address


def open_sglang(
    config: Config, model: ModelConfig, trainer: TrainingEngine, device: torch.device, stack: AsyncExitStack
) -> SGLangEngine:
    """Start the servers, or find them, and return when all generate. `stack` ends those that were started.

    Raises:
        OptionError: the installed SGLang has no such argument.
        RolloutError: a server did not start.
    """
    options = config.sglang
    returns_routes = bool(
        model.num_sparse_layers
        and (config.algorithm.use_rollout_routing_replay or options.server_args.get("enable_return_routed_experts"))
    )
    external = options.rollout_external_engine_addrs
    plan = None if external else _plan(config, device, returns_routes=returns_routes)
    folder = Path(config.weight_sync.update_weight_disk_dir or Path(config.logging.run_dir) / "sglang" / "weights")
    hf_folder = Path(config.model.hf_checkpoint)
    fleet = ServerFleet(
        plan=plan,
        addresses=external,
        source=WeightSource(
            export=lambda target: trainer.export(target, source=hf_folder),
            model=trainer.rollout_weights if isinstance(trainer, LocalTrainer) else None,
        ),
        transport=_transport(config, trainer, device, folder),
        hf_folder=hf_folder,
        export_folder=folder,
        start_timeout_s=options.rollout_server_start_timeout,
        check_equal=config.weight_sync.check_weight_update_equal,
    )
    stack.callback(fleet.close)
    what = f"{len(fleet.servers)} SGLang servers"
    print(f"waiting for {what}, whose log is in {plan.log_folder}" if plan else f"looking for {what}", file=sys.stderr)
    fleet.wait_until_ready()
    return SGLangEngine(
        fleet,
        seed=config.data.rollout_seed,
        routes_shape=(model.num_sparse_layers, model.num_experts_per_tok) if returns_routes else None,
        request_timeout_s=options.rollout_request_timeout,
        health_interval_s=options.rollout_health_check_interval,
        health_timeout_s=options.rollout_health_check_timeout,
    )


def _plan(config: Config, device: torch.device, *, returns_routes: bool) -> ServerPlan:
    options, cluster = config.sglang, config.cluster
    assert options.sglang_python is not None, "checked before"
    python, tp_size = os.path.abspath(options.sglang_python), cluster.rollout_num_gpus_per_engine
    words = server_words(options.server_args, tp_size=tp_size)
    if returns_routes and "--enable-return-routed-experts" not in words:
        words.append("--enable-return-routed-experts")
    require_known(words, known_flags(python))
    is_separate = cluster.rollout_num_gpus is not None
    return ServerPlan(
        python=python,
        words=[*words, "--tp-size", str(tp_size)],
        num_servers=(cluster.rollout_num_gpus or cluster.actor_num_gpus_per_node) // tp_size,
        gpus_per_server=tp_size,
        first_gpu=(cluster.actor_num_gpus_per_node if is_separate else 0) if device.type == "cuda" else None,
        log_folder=Path(config.logging.run_dir) / "sglang",
        start_timeout_s=options.rollout_server_start_timeout,
    )


def _transport(config: Config, trainer: TrainingEngine, device: torch.device, folder: Path) -> Transport:
    options, tp_size = config.weight_sync, config.cluster.rollout_num_gpus_per_engine
    external = config.sglang.rollout_external_engine_addrs
    timeout_s = config.sglang.rollout_server_start_timeout
    shares_device = not external and (device.type == "cpu" or config.cluster.rollout_num_gpus is None)
    kind = options.update_weight_transport or ("tensor" if shares_device else "nccl")
    if kind == "disk" or not isinstance(trainer, LocalTrainer):
        return DiskTransport(folder, timeout_s=timeout_s)
    if kind == "tensor":
        return TensorTransport(bucket_bytes=options.update_weight_buffer_size, tp_size=tp_size, timeout_s=timeout_s)
    return BroadcastTransport(
        backend="nccl" if device.type == "cuda" else "gloo",
        bucket_bytes=options.update_weight_buffer_size,
        tp_size=tp_size,
        host=own_address([_host(address) for address in external] or ["127.0.0.1"]),
        timeout_s=timeout_s,
    )


def _host(address: str) -> str:
    return urlsplit(address if "://" in address else f"//{address}").hostname or address
