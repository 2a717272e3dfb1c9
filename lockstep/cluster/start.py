"""Where a run's trainer and sampler live: in this process, or in one process for each of several ranks."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Protocol

import torch

from lockstep.checkpoint.hf import OnBytes, load_hf_model, read_hf_config
from lockstep.cluster.engines import GroupEngine, GroupTrainer
from lockstep.cluster.group import WorkerGroup
from lockstep.cluster.parts import (
    cache_bytes,
    embedded_engine,
    kv_tokens,
    layout_of,
    pick_device,
    reference_folder,
    trainer_options,
)
from lockstep.cluster.rank import Rank, RankPlan
from lockstep.config import Config
from lockstep.errors import OptionError
from lockstep.models import LanguageModel, ModelConfig, read_model_config
from lockstep.rollout.engine import RolloutEngine
from lockstep.tracking.transfer import TransferProgress
from lockstep.trainer.engine import TrainingEngine
from lockstep.trainer.local import LocalTrainer


class Workers(Protocol):
    """A training engine, and a rollout engine once it is opened."""

    trainer: TrainingEngine

    def kv_tokens(self, longest: int) -> int:
        """Tokens of the KV cache that there is room for beside the trainer, and use for.

        Args:
            longest: tokens that one prompt with its response may need.
        """
        ...

    def open_engine(self, num_tokens: int, max_context_len: int) -> RolloutEngine:
        """Make room for a cache of that many tokens, in each process."""
        ...


def require_possible(config: Config, model: ModelConfig, *, samples_something: bool) -> None:
    """Refuse what this machine or model cannot be divided into, before anything is loaded.

    Raises:
        OptionError: naming the option, and what works.
    """
    layout = layout_of(config)
    layout.check(model)
    pick_device(config)
    if layout.pp_size > 1 and samples_something:
        raise OptionError(
            "--pipeline-model-parallel-size",
            layout.pp_size,
            "the embedded engine has no pipeline, and SGLang servers, which would sample for one, are not there yet.",
            "Use 1; or train on stored rollouts (--load-debug-rollout-data), or by --loss-type sft_loss without "
            "evaluation.",
        )
    if layout.world_size > 1 and config.batching.backward_order == "layer":
        raise OptionError(
            "--backward-order",
            "layer",
            "it is there for one process only.",
            "Use micro-batch, with --recompute-granularity full to save memory.",
        )


def start_workers(
    config: Config, stack: AsyncExitStack, *, num_steps: int, on_sample: Callable[[int], None]
) -> Workers:
    """Load the weights, here or into processes of their own, which `stack` ends.

    Args:
        num_steps: optimizer steps of the whole run.
        on_sample: called with a number of samples that training has finished, for progress.
    """
    start: Any = _Here if config.cluster.actor_num_gpus_per_node == 1 else _Ranks
    workers: Workers = start(config, stack, num_steps, on_sample)
    return workers


class _Here:
    """This process is the one rank: the sampler decodes on the trainer's own parameters."""

    def __init__(self, config: Config, stack: AsyncExitStack, num_steps: int, on_sample: Callable[[int], None]) -> None:
        self._config, self._stack = config, stack
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

    def _load(self, folder: Path, label: str) -> LanguageModel:
        dtype = getattr(torch, self._config.model.params_dtype)
        with TransferProgress(label) as progress:
            return load_hf_model(folder, dtype=dtype, device=self._device, on_bytes=progress)


class _Ranks:
    """One process per rank; this one keeps no weights."""

    def __init__(self, config: Config, stack: AsyncExitStack, num_steps: int, on_sample: Callable[[int], None]) -> None:
        layout = layout_of(config)
        meeting = stack.enter_context(tempfile.TemporaryDirectory(prefix="lockstep-ranks-"))
        listeners: dict[str, OnBytes] = {}

        def on_news(rank: int, kind: str, value: Any) -> None:
            if kind == "samples":
                on_sample(value)
            elif rank == 0 and kind in listeners:
                listeners[kind](*value)

        plan = RankPlan(config, pick_device(config).type, num_steps, Path(meeting) / "store")
        self._group = WorkerGroup(
            layout.world_size,
            Rank,
            (plan,),
            timeout_s=60.0 * config.cluster.distributed_timeout_minutes,
            on_news=on_news,
        )
        stack.callback(self._group.close)
        print(f"{layout.world_size} processes on {plan.device_type}: {layout}", file=sys.stderr, flush=True)
        with TransferProgress("loading") as progress:
            listeners["loading"] = progress
            self._group.wait_for_start()
        self.trainer = GroupTrainer(self._group, listeners)
        self._has_experts = read_model_config(read_hf_config(Path(config.model.hf_checkpoint))).num_sparse_layers > 0

    def kv_tokens(self, longest: int) -> int:
        room: list[int] = self._group.call("kv_tokens", longest)
        return min(room)

    def open_engine(self, num_tokens: int, max_context_len: int) -> RolloutEngine:
        self._group.call("open_engine", num_tokens, max_context_len)
        return GroupEngine(self._group, together=self._has_experts)
