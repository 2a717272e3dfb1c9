"""Where a run's trainer and sampler live: in this process, or in one process for each of several ranks."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from lockstep.checkpoint.hf import OnBytes, load_hf_model, read_hf_config
from lockstep.cluster.engines import GroupEngine, GroupTrainer, ReplicaEngine
from lockstep.cluster.executor import Executor, LocalProcesses
from lockstep.cluster.group import WorkerGroup
from lockstep.cluster.parts import (
    cache_bytes,
    embedded_engine,
    kv_tokens,
    layout_of,
    pick_device,
    reference_folder,
    trainer_options,
    weights_filler,
)
from lockstep.cluster.rank import Rank, RankPlan
from lockstep.cluster.replica import Replica, ReplicaPlan
from lockstep.cluster.shared_paths import expected_paths
from lockstep.config import Config
from lockstep.errors import OptionError
from lockstep.exact import compute_exactly, require_exactness
from lockstep.models import LanguageModel, ModelConfig, read_model_config
from lockstep.parallel.mesh import Layout
from lockstep.rollout.engine import RolloutEngine
from lockstep.rollout.sglang.process import LocalServers, ServerPlaces
from lockstep.tracking.transfer import TransferProgress
from lockstep.trainer.engine import TrainingEngine
from lockstep.trainer.local import LocalTrainer
from lockstep.weight_sync.copies import CopySender, copies_group

if TYPE_CHECKING:
    from lockstep.cluster.ray_cluster import RayCluster

_dist: Any = dist  # TCPStore is not among its declared names


class Workers(Protocol):
    """A training engine, and a rollout engine once it is opened."""

    trainer: TrainingEngine
    machines: Machines

    def kv_tokens(self, longest: int) -> int:
        """Tokens of the KV cache that there is room for beside the trainer, and use for.

        Args:
            longest: tokens that one prompt with its response may need.
        """
        ...

    def open_engine(self, num_tokens: int, max_context_len: int) -> RolloutEngine:
        """Make room for a cache of that many tokens, in each process."""
        ...


class _Senders(Workers, Protocol):
    """Workers whose weights others may copy."""

    def open_copies(self, address: tuple[str, int], num_receivers: int) -> None:
        """Meet, at a store's address, processes that keep copies of the weights."""
        ...

    def send_copies(self) -> None:
        """Send them the weights, which they receive at the same time."""
        ...


def require_possible(config: Config, model: ModelConfig, *, samples_something: bool) -> None:
    """Refuse what this machine or model cannot be divided into, before anything is loaded.

    Raises:
        OptionError: naming the option, and what works.
    """
    layout = layout_of(config)
    layout.check(model)
    if not config.cluster.uses_ray:
        pick_device(config)
    elif _places_servers(config):
        _require_whole_nodes(config)
    if layout.pp_size > 1 and samples_something:
        raise OptionError(
            "--pipeline-model-parallel-size",
            layout.pp_size,
            "the embedded engine has no pipeline.",
            "Use 1, or --rollout-engine sglang; or train on stored rollouts (--load-debug-rollout-data), or by "
            "--loss-type sft_loss without evaluation.",
        )
    if config.batching.backward_order == "layer":
        _require_one_reduction(config, layout)
    if config.algorithm.true_on_policy:
        require_exactness(model, pick_device(config), getattr(torch, config.model.params_dtype))


def _places_servers(config: Config) -> bool:
    """Whether servers of our own run on a Ray cluster's nodes."""
    is_ours = config.rollout.rollout_engine == "sglang" and not config.sglang.rollout_external_engine_addrs
    return is_ours and config.cluster.uses_ray


def _require_whole_nodes(config: Config) -> None:
    """A server divides a node's GPUs with others, or has whole nodes."""
    cluster = config.cluster
    size, per_node = cluster.rollout_num_gpus_per_engine, cluster.actor_num_gpus_per_node
    shares_gpus = not cluster.rollout_num_gpus
    if (size > per_node and size % per_node) or (size < per_node and shares_gpus and per_node % size):
        raise OptionError(
            "--rollout-num-gpus-per-engine",
            size,
            f"a server of this size would have parts of nodes, whose GPUs are --actor-num-gpus-per-node {per_node}.",
            f"Use a divisor or a multiple of {per_node}.",
        )


def _require_one_reduction(config: Config, layout: Layout) -> None:
    """By layer, a layer is finished for the whole step before the one below it begins, and then reduced in fp32."""
    if layout.pp_size > 1:
        raise OptionError(
            "--backward-order",
            "layer",
            f"each of the {layout.pp_size} pipeline stages would wait until the one after it has finished the step.",
            "Use --pipeline-model-parallel-size 1, which allows every other kind of parallelism; or "
            "--backward-order micro-batch with --recompute-granularity full.",
        )
    if config.parallel.grad_reduce_in_bf16 and layout.world_size > 1:
        raise OptionError(
            "--grad-reduce-in-bf16",
            "True",
            "with --backward-order layer the sums of gradients are fp32 until they are complete.",
            "Leave it out: by layer, gradients cross ranks only once a step.",
        )


def start_workers(
    config: Config, stack: AsyncExitStack, *, num_steps: int, on_sample: Callable[[int], None]
) -> Workers:
    """Load the weights, here or into processes of their own, which `stack` ends.

    Args:
        num_steps: optimizer steps of the whole run.
        on_sample: called with a number of samples that training has finished, for progress.
    """
    machines = _machines(config, stack)
    workers: Any
    if config.cluster.num_ranks == 1 and not config.cluster.uses_ray:
        workers = _Here(config, stack, num_steps, on_sample, machines)
    else:
        workers = _Ranks(config, stack, num_steps, on_sample, machines)
    if config.cluster.has_replicas(config.rollout.rollout_engine):
        workers = _WithReplicas(config, stack, workers, machines)
    started: Workers = workers
    return started


@dataclass(frozen=True)
class Machines:
    """Where processes are started, and where they find the controller."""

    device_type: str
    address: str
    ranks: Executor
    replicas: Executor
    servers: ServerPlaces


def _machines(config: Config, stack: AsyncExitStack) -> Machines:
    cluster = config.cluster
    shares_gpus, server_size = not cluster.rollout_num_gpus, cluster.rollout_num_gpus_per_engine
    if not cluster.uses_ray:
        device_type = pick_device(config).type
        first_gpu = 0 if shares_gpus else cluster.num_ranks
        return Machines(
            device_type,
            "127.0.0.1",
            ranks=LocalProcesses(),
            replicas=LocalProcesses(first_gpu=cluster.num_ranks, what="replica"),
            servers=LocalServers(server_size, first_gpu if device_type == "cuda" else None),
        )
    ray_cluster = _join_ray(config)
    stack.callback(ray_cluster.close)
    with expected_paths(config) as paths:
        ray_cluster.require_shared(paths)
    trains = range(cluster.actor_num_nodes)
    samples = range(cluster.actor_num_nodes, len(ray_cluster.addresses))
    return Machines(
        ray_cluster.device_type,
        ray_cluster.controller_address,
        ranks=ray_cluster.processes(trains, "rank"),
        replicas=ray_cluster.processes(samples, "replica"),
        servers=ray_cluster.servers(
            trains if shares_gpus else samples,
            gpus_per_share=cluster.actor_num_gpus_per_node if shares_gpus else _server_share(config),
            gpus_per_server=server_size,
        ),
    )


def _server_share(config: Config) -> int:
    """GPUs of one server on one node, where servers have GPUs of their own."""
    return min(config.cluster.rollout_num_gpus_per_engine, config.cluster.actor_num_gpus_per_node)


def _join_ray(config: Config) -> RayCluster:
    if "RAY_AUTH_TOKEN" in os.environ or (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # `ray start` does so too; Ray reads it when it is imported
    try:
        from lockstep.cluster.ray_cluster import RayCluster
    except ModuleNotFoundError as error:
        raise OptionError(
            "--actor-num-nodes" if config.cluster.ray_address is None else "--ray-address",
            config.cluster.ray_address or config.cluster.actor_num_nodes,
            f"Ray would start the processes, and it is not installed ({error.name}).",
            'Install it on every machine: pip install "ray>=2.60,<3".',
        ) from None
    cluster = config.cluster
    shares = [cluster.actor_num_gpus_per_node] * cluster.actor_num_nodes
    num_others = cluster.rollout_num_gpus or 0
    if cluster.has_replicas(config.rollout.rollout_engine):
        shares += [1] * num_others
    elif _places_servers(config):
        shares += [_server_share(config)] * (num_others // _server_share(config))
    timeout_s = 60.0 * cluster.distributed_timeout_minutes
    before = random.getstate()
    try:
        return RayCluster(cluster.ray_address, shares, device=cluster.device, timeout_s=timeout_s)
    finally:
        random.setstate(before)  # Ray draws from the generator that hooks draw from


@contextmanager
def _meeting_place(config: Config, machines: Machines) -> Iterator[tuple[str, int]]:
    """The address of a store in this process, where those of a process group find each other, also for groups that
    they make later: NCCL asks it when two ranks meet for the first time, and its watch every second."""
    timeout = timedelta(minutes=config.cluster.distributed_timeout_minutes)
    store = _dist.TCPStore(machines.address, 0, is_master=True, wait_for_workers=False, timeout=timeout)
    yield machines.address, store.port


class _Here:
    """This process is the one rank: the sampler decodes on the trainer's own parameters."""

    def __init__(
        self,
        config: Config,
        stack: AsyncExitStack,
        num_steps: int,
        on_sample: Callable[[int], None],
        machines: Machines,
    ) -> None:
        self._config, self._stack, self.machines = config, stack, machines
        self._device = pick_device(config)
        model = self._load(Path(config.model.hf_checkpoint), "loading")
        folder = reference_folder(config)
        reference = None if folder is None else self._load(folder, "loading the reference").requires_grad_(False)
        self.trainer = LocalTrainer(
            model, reference=reference, on_micro_batch=on_sample, **trainer_options(config, num_steps)
        )

    def kv_tokens(self, longest: int) -> int:
        model = self.trainer.model
        element_size = model.lm_head.weight.element_size()
        gradients_and_moments = 12 * sum(p.numel() for p in model.parameters())  # fp32, first made in training
        room = cache_bytes(self._config, self._device, reserved=gradients_and_moments)
        return kv_tokens(self._config, model.config, element_size=element_size, num_bytes=room, longest=longest)

    def open_engine(self, num_tokens: int, max_context_len: int) -> RolloutEngine:
        model = self._stack.enter_context(self.trainer.rollout_weights())
        return embedded_engine(self._config, model, num_tokens, max_context_len)

    def open_copies(self, address: tuple[str, int], num_receivers: int) -> None:
        self._copies = CopySender(copies_group(self._config, self._device, address, 0, 1 + num_receivers))

    def send_copies(self) -> None:
        with self.trainer.rollout_weights() as model:
            self._copies.send(model.named_parameters())

    def _load(self, folder: Path, label: str) -> LanguageModel:
        dtype = getattr(torch, self._config.model.params_dtype)
        with TransferProgress(label) as progress:
            model = load_hf_model(
                folder, dtype=dtype, device=self._device, on_bytes=progress, fill=weights_filler(self._config)
            )
        if self._config.algorithm.true_on_policy:
            compute_exactly(model)
        return model


class _InProcesses:
    """Workers that sample in the processes of a group."""

    _group: WorkerGroup
    _engine: RolloutEngine

    def kv_tokens(self, longest: int) -> int:
        room: list[int] = self._group.call("kv_tokens", longest)
        return min(room)

    def open_engine(self, num_tokens: int, max_context_len: int) -> RolloutEngine:
        self._group.call("open_engine", num_tokens, max_context_len)
        return self._engine


class _Ranks(_InProcesses):
    """One process per rank; this one keeps no weights."""

    def __init__(
        self,
        config: Config,
        stack: AsyncExitStack,
        num_steps: int,
        on_sample: Callable[[int], None],
        machines: Machines,
    ) -> None:
        self.machines = machines
        layout = layout_of(config)
        listeners: dict[str, OnBytes] = {}

        def on_news(rank: int, kind: str, value: Any) -> None:
            if kind == "samples":
                on_sample(value)
            elif rank == 0 and kind in listeners:
                listeners[kind](*value)

        rendezvous = stack.enter_context(_meeting_place(config, machines))
        plan = RankPlan(config, machines.device_type, num_steps, rendezvous)
        self._group = WorkerGroup(
            layout.world_size,
            Rank,
            (plan,),
            timeout_s=60.0 * config.cluster.distributed_timeout_minutes,
            on_news=on_news,
            executor=machines.ranks,
        )
        stack.callback(self._group.close)
        print(f"{layout.world_size} processes on {plan.device_type}: {layout}", file=sys.stderr, flush=True)
        with TransferProgress("loading") as progress:
            listeners["loading"] = progress
            self._group.wait_for_start()
        self.trainer = GroupTrainer(self._group, listeners)
        model = read_model_config(read_hf_config(Path(config.model.hf_checkpoint)))
        self._engine = GroupEngine(self._group, together=model.num_sparse_layers > 0)

    def open_copies(self, address: tuple[str, int], num_receivers: int) -> None:
        self._group.call("open_copies", address, num_receivers)

    def send_copies(self) -> None:
        self._group.call("send_copies")


class _WithReplicas(_InProcesses):
    """Training as it is, and processes with copies of its weights, which sample."""

    def __init__(self, config: Config, stack: AsyncExitStack, workers: _Senders, machines: Machines) -> None:
        self.trainer, self.machines = workers.trainer, machines
        address = stack.enter_context(_meeting_place(config, machines))
        self._group = WorkerGroup(
            config.cluster.rollout_num_gpus or 0,
            Replica,
            (ReplicaPlan(config, machines.device_type),),
            timeout_s=60.0 * config.cluster.distributed_timeout_minutes,
            executor=machines.replicas,
        )
        stack.callback(self._group.close)
        print(f"{len(self._group)} processes on {machines.device_type} that sample", file=sys.stderr, flush=True)
        self._group.wait_for_start()
        joining = self._group.begin("open_copies", address)
        workers.open_copies(address, len(self._group))
        self._group.finish(joining)
        self._engine = ReplicaEngine(self._group, workers.send_copies)
