"""From the options to an engine with servers behind it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import torch

from lockstep.config import Config
from lockstep.errors import OptionError, RolloutError
from lockstep.models import ModelConfig
from lockstep.rollout.sglang.arguments import known_flags, require_known, server_words
from lockstep.rollout.sglang.engine import SGLangEngine
from lockstep.rollout.sglang.fleet import ServerFleet, ServerPlan
from lockstep.rollout.sglang.process import ServerPlaces
from lockstep.trainer.engine import TrainingEngine
from lockstep.trainer.local import LocalTrainer
from lockstep.weight_sync import DiskTransport, Transport, WeightSource
from lockstep.weight_sync.ranks import Ranks, RanksTransport, TransportPlan


def open_sglang(
    config: Config,
    model: ModelConfig,
    trainer: TrainingEngine,
    device: torch.device,
    places: ServerPlaces,
    stack: AsyncExitStack,
) -> SGLangEngine:
    """Start the servers, or find them, and return when all generate. `stack` ends those that were started.

    Args:
        device: what training computes on.
        places: where servers are started.
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
    shares_gpus = device.type == "cuda" and not external and not config.cluster.rollout_num_gpus
    releases_memory = shares_gpus and config.cluster.offload_rollout
    plan = None if external else _plan(config, places, returns_routes=returns_routes, releases_memory=releases_memory)
    transport = _transport(config, trainer, device)
    folder = weights_folder(config)
    hf_folder = Path(config.model.hf_checkpoint)
    fleet = ServerFleet(
        plan=plan,
        addresses=external,
        source=WeightSource(
            export=lambda target: trainer.export(target, source=hf_folder),
            model=trainer.rollout_weights if isinstance(trainer, LocalTrainer) else None,
            version=lambda: trainer.version,
            is_at_rest=lambda: not trainer.is_at_work,
        ),
        transport=transport or DiskTransport(folder, timeout_s=options.rollout_server_start_timeout),
        hf_folder=hf_folder,
        export_folder=folder,
        start_timeout_s=options.rollout_server_start_timeout,
        check_equal=config.weight_sync.check_weight_update_equal,
        health_timeout_s=options.rollout_health_check_timeout,
        free_memory=_free_memory(trainer) if releases_memory else None,
    )
    stack.callback(fleet.close)
    what = f"{len(fleet.servers)} SGLang servers"
    print(f"waiting for {what}, whose log is in {plan.log_folder}" if plan else f"looking for {what}", file=sys.stderr)
    try:
        fleet.wait_until_ready()
    except RolloutError:
        if plan is not None:  # an argument that it has not got is the likeliest reason, and then the nearest is named
            require_known(plan.words, known_flags(plan.python))
        raise
    return SGLangEngine(
        fleet,
        seed=config.data.rollout_seed,
        routes_shape=(model.num_sparse_layers, model.num_experts_per_tok) if returns_routes else None,
        request_timeout_s=options.rollout_request_timeout,
        health_interval_s=options.rollout_health_check_interval,
        health_timeout_s=options.rollout_health_check_timeout,
        pause_mode=config.weight_sync.pause_generation_mode,
    )


def weights_folder(config: Config) -> Path:
    """Where weights lie for servers that read them from disk."""
    return Path(config.weight_sync.update_weight_disk_dir or Path(config.logging.run_dir) / "sglang" / "weights")


def _plan(config: Config, places: ServerPlaces, *, returns_routes: bool, releases_memory: bool) -> ServerPlan:
    options, cluster = config.sglang, config.cluster
    assert options.sglang_python is not None, "checked before"
    python, tp_size = os.path.abspath(options.sglang_python), cluster.rollout_num_gpus_per_engine
    # By itself SGLang reads an fp32 checkpoint as fp16.
    server_args = {"dtype": config.model.params_dtype} | options.server_args
    words = server_words(server_args, tp_size=tp_size)
    if returns_routes:
        # A shared expert that is computed as one more of the chosen ones breaks SGLang's record of them.
        ours = ("--enable-return-routed-experts", "--disable-shared-experts-fusion")
        words += [word for word in ours if word not in words]
    if releases_memory:
        # Training sends no draft weights, so what servers release of them has to come back by itself.
        kept = ["--enable-draft-weights-cpu-backup"] if "--speculative-algorithm" in words else []
        words += [word for word in ("--enable-memory-saver", *kept) if word not in words]
    if not os.access(python, os.X_OK):
        raise OptionError(
            "--sglang-python", python, "it is no program.", "Give the Python of the environment that has SGLang."
        )
    return ServerPlan(
        python=python,
        words=[*words, "--tp-size", str(tp_size)],
        num_servers=(cluster.rollout_num_gpus or cluster.num_ranks) // tp_size,
        log_folder=Path(config.logging.run_dir) / "sglang",
        places=places,
    )


def _transport(config: Config, trainer: TrainingEngine, device: torch.device) -> Transport | None:
    """None for a folder on disk."""
    options, cluster = config.weight_sync, config.cluster
    is_ours = not config.sglang.rollout_external_engine_addrs
    shares_device = is_ours and (not cluster.rollout_num_gpus or (device.type == "cpu" and not cluster.uses_ray))
    kind = options.update_weight_transport or ("tensor" if shares_device else "nccl")
    if kind == "disk":
        return None
    plan = TransportPlan(
        kind=kind,
        backend="nccl" if device.type == "cuda" else "gloo",
        bucket_bytes=options.update_weight_buffer_size
        or (2**31 if kind == "tensor" and device.type == "cuda" else 2**29),
        tp_size=cluster.rollout_num_gpus_per_engine,
        timeout_s=config.sglang.rollout_server_start_timeout,
    )
    return plan.make() if isinstance(trainer, LocalTrainer) else RanksTransport(_ranks_of(trainer), plan)


def _free_memory(trainer: TrainingEngine) -> Callable[[], None]:
    """What makes training give back GPU memory that only lies in reserve."""
    if isinstance(trainer, LocalTrainer):
        return torch.cuda.empty_cache
    ranks = _ranks_of(trainer)

    def free() -> None:
        ranks.call("weights", "free_memory")

    return free


def _ranks_of(trainer: TrainingEngine) -> Ranks:
    """The processes of a divided trainer."""
    ranks: Ranks = trainer.group  # type: ignore[attr-defined]
    return ranks
