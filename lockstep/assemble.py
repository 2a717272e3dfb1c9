"""From options to the objects of a run. Every choice between implementations is made here, once."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lockstep.algorithms import AdvantageEstimator, make_advantage_estimator
from lockstep.checkpoint.hf import read_hf_config
from lockstep.checkpoint.training import find_checkpoint, read_state
from lockstep.cluster.parts import pick_device
from lockstep.cluster.start import Workers, require_possible, start_workers
from lockstep.config import Args, Config
from lockstep.config.hooks import load_function, load_hook, load_optional_hook, our_path
from lockstep.config.model_flags import check_model_flags
from lockstep.data import load_tokenizer
from lockstep.data.chat import SftTokenizer
from lockstep.data.choose_source import DataSource, make_data_source
from lockstep.errors import ModelError
from lockstep.models import ModelConfig, read_model_config
from lockstep.plan import Hardware, Prediction, predict
from lockstep.plan.batches import longest_context
from lockstep.plan.meter import MemoryMeter, NoMeter, ProcessMeter
from lockstep.rewards import RewardPool
from lockstep.rollout.endpoint import Endpoint, GatedEngine, ServedPolicy, listen
from lockstep.rollout.endpoint.requests import Limits
from lockstep.rollout.engine import RolloutEngine
from lockstep.rollout.evaluation import EvalSet, load_eval_sets
from lockstep.rollout.generate import RolloutContext, generate_rollout
from lockstep.rollout.hooks import RolloutHooks
from lockstep.rollout.policy import Policy
from lockstep.rollout.sft import SftRollout
from lockstep.rollout.sglang.open import open_sglang
from lockstep.run import Run, resume_run

_DEFAULT_ROLLOUT = "lockstep.rollout.generate.generate_rollout"


def assemble(
    config: Config, stack: AsyncExitStack, *, on_sampled: Callable[[], None], on_trained: Callable[[int], None]
) -> Run:
    """Build a run; what must be closed again is pushed on `stack`.

    Args:
        on_sampled: called for every sample that sampling has finished, for progress.
        on_trained: called with a number of samples that training has finished.
    """
    _prepare_process(config)
    inputs = _Inputs.read(config)
    require_possible(config, inputs.model, samples_something=inputs.samples_something and inputs.is_embedded)
    listener = _listener(config, stack) if inputs.samples_something else None
    prediction, memory = _memory(inputs)
    memory.start()
    checkpoint = find_checkpoint(Path(config.checkpoint.load)) if config.checkpoint.load else None
    num_steps = inputs.num_rollout * config.rollout.steps_per_rollout
    workers = start_workers(config, stack, num_steps=num_steps, on_sample=on_trained)
    engine, context, kv_tokens = None, None, None
    if inputs.samples_something:
        engine, kv_tokens = _open_engine(inputs, workers, checkpoint, prediction, stack)
        engine, url = _open_endpoint(inputs, engine, listener, stack)
        context = _rollout_context(inputs, engine, url, on_sampled)
    run = Run(
        config=config,
        args=inputs.args,
        tokenizer=inputs.tokenizer,
        trainer=workers.trainer,
        engine=engine,
        data_source=inputs.data_source,
        rollout_function=_rollout_function(inputs),
        eval_function=_eval_function(config) if inputs.eval_sets and context else None,
        context=context,
        advantage_estimator=None if inputs.is_sft else _advantage_estimator(config),
        reward_post_process=load_optional_hook(
            config.reward.custom_reward_post_process_path, "--custom-reward-post-process-path"
        ),
        data_postprocess=load_optional_hook(
            config.rollout.rollout_data_postprocess_path, "--rollout-data-postprocess-path"
        ),
        run_dir=Path(config.logging.run_dir),
        num_rollout=inputs.num_rollout,
        next_rollout_id=config.rollout.start_rollout_id or 0,
        kv_tokens=kv_tokens,
        memory=memory,
    )
    resume_run(run, checkpoint)
    memory.stop("load")
    return run


@dataclass(frozen=True)
class _Inputs:
    """What is read, and found to fit together, before any weight is loaded."""

    config: Config
    args: Args
    hf_config: dict[str, Any]
    model: ModelConfig
    tokenizer: Any
    data_source: DataSource
    num_rollout: int
    max_context_len: int
    eval_sets: list[EvalSet]
    hooks: RolloutHooks

    @classmethod
    def read(cls, config: Config) -> _Inputs:
        hf_folder = Path(config.model.hf_checkpoint)
        hf_config = read_hf_config(hf_folder)
        check_model_flags(config, hf_config)
        model = read_model_config(hf_config)
        tokenizer: Any = load_tokenizer(hf_folder)
        _check_tokenizer(tokenizer, model)
        if config.reward.custom_rm_path is not None:
            load_function(config.reward.custom_rm_path, "--custom-rm-path")  # runs in workers; a typo is found here
        data_source = make_data_source(config, tokenizer)
        return cls(
            config=config,
            args=config.args(),
            hf_config=hf_config,
            model=model,
            tokenizer=tokenizer,
            data_source=data_source,
            num_rollout=_num_rollout(config, data_source),
            max_context_len=longest_context(config, model),
            eval_sets=load_eval_sets(config, tokenizer, model.max_position_embeddings),
            hooks=RolloutHooks.from_config(config),
        )

    @property
    def is_sft(self) -> bool:
        return self.config.algorithm.loss_type == "sft_loss"

    @property
    def is_embedded(self) -> bool:
        return self.config.rollout.rollout_engine == "embedded"

    @property
    def samples_something(self) -> bool:
        return not self.config.debug.samples_nothing and (not self.is_sft or bool(self.eval_sets))

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return stop_token_ids(Path(self.config.model.hf_checkpoint), self.hf_config, self.tokenizer)


def _prepare_process(config: Config) -> None:
    """Its threads; and its global generators, which hooks may draw from, start at the same place in every run."""
    if config.cluster.num_threads:
        torch.set_num_threads(config.cluster.num_threads)
    seed = config.optimizer.seed
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _listener(config: Config, stack: AsyncExitStack) -> socket.socket | None:
    address, port = config.sglang.sglang_router_ip, config.sglang.sglang_router_port
    return None if port is None else stack.enter_context(listen(address, port, "--sglang-router-port"))


def _open_engine(
    inputs: _Inputs, workers: Workers, checkpoint: Path | None, prediction: Prediction | None, stack: AsyncExitStack
) -> tuple[RolloutEngine, int | None]:
    """The engine, and the tokens of its cache where it is ours."""
    if not inputs.is_embedded:
        device, places = torch.device(workers.machines.device_type), workers.machines.servers
        return open_sglang(inputs.config, inputs.model, workers.trainer, device, places, stack), None
    kv_tokens = _kv_tokens(inputs, checkpoint, prediction, workers)
    engine = workers.open_engine(kv_tokens, inputs.max_context_len)
    stack.callback(engine.close)
    return engine, kv_tokens


def _open_endpoint(
    inputs: _Inputs, engine: RolloutEngine, listener: socket.socket | None, stack: AsyncExitStack
) -> tuple[RolloutEngine, str | None]:
    """Let others sample from the policy in training; returns the engine that the run has to use, and the address."""
    if listener is None:
        return engine, None
    config, options = inputs.config, inputs.config.rollout
    limits = Limits(
        model=Path(config.model.hf_checkpoint).resolve().name,
        tokenizer=inputs.tokenizer,
        defaults={
            "temperature": options.rollout_temperature,
            "top_p": options.rollout_top_p,
            "top_k": options.rollout_top_k,
        },
        stop_token_ids=inputs.stop_token_ids,
        max_context_len=inputs.max_context_len,
        vocab_size=inputs.model.vocab_size,
        chat_template_kwargs=config.data.apply_chat_template_kwargs,
    )
    gated = GatedEngine(engine)
    endpoint = Endpoint(ServedPolicy(gated, limits, asyncio.get_running_loop()), listener)
    stack.push_async_callback(asyncio.to_thread, endpoint.close)
    print(f"the policy answers at {endpoint.url}", file=sys.stderr, flush=True)
    return gated, endpoint.url


def _rollout_context(
    inputs: _Inputs, engine: RolloutEngine, url: str | None, on_sampled: Callable[[], None]
) -> RolloutContext:
    config = inputs.config
    return RolloutContext(
        policy=Policy(
            engine=engine,
            tokenizer=inputs.tokenizer,
            stop_token_ids=inputs.stop_token_ids,
            max_context_len=inputs.max_context_len,
            skip_special_tokens=config.rollout.rollout_skip_special_tokens,
            url=url,
        ),
        rewards=RewardPool(
            inputs.args,
            num_workers=config.reward.reward_num_workers,
            timeout_s=config.reward.reward_timeout,
            failure_policy=config.reward.reward_failure_policy,
        ),
        hooks=inputs.hooks,
        sampling_params=_sampling_params(config),
        eval_sets=inputs.eval_sets,
        on_sample=on_sampled,
    )


def _memory(inputs: _Inputs) -> tuple[Prediction | None, MemoryMeter]:
    """What a run on this machine will take, and what measures it; ranks in processes of their own are not measured."""
    config = inputs.config
    if config.cluster.uses_ray:
        return None, NoMeter()
    device = pick_device(config)
    hardware = Hardware.of_this_machine(with_gpus=device.type == "cuda")
    samples_here = inputs.samples_something and inputs.is_embedded and not config.cluster.has_replicas("embedded")
    prediction = predict(config, inputs.model, hardware, samples=samples_here)
    return prediction, NoMeter() if config.cluster.num_ranks > 1 else ProcessMeter(prediction, device)


def _rollout_function(inputs: _Inputs) -> Callable[..., Any]:
    path = inputs.config.rollout.rollout_function_path
    if inputs.is_sft and our_path(path) == _DEFAULT_ROLLOUT:
        return SftRollout(SftTokenizer(inputs.tokenizer))
    return _ours_or_users(path, "--rollout-function-path")


def _eval_function(config: Config) -> Callable[..., Any]:
    path = config.eval.eval_function_path or config.rollout.rollout_function_path
    return _ours_or_users(path, "--eval-function-path")


def _ours_or_users(path: str, option: str) -> Callable[..., Any]:
    """The user's exceptions name the option."""
    return generate_rollout if our_path(path) == _DEFAULT_ROLLOUT else load_hook(path, option)


def _advantage_estimator(config: Config) -> AdvantageEstimator:
    options = config.algorithm
    return make_advantage_estimator(
        options.advantage_estimator,
        disable_rewards_normalization=options.disable_rewards_normalization,
        disable_grpo_std_normalization=options.disable_grpo_std_normalization,
    )


def _num_rollout(config: Config, data_source: DataSource) -> int:
    """Rollouts of the whole run; 0 when neither option says it, which only evaluation allows."""
    options = config.rollout
    if options.num_rollout is not None or options.num_epoch is None:
        return options.num_rollout or 0
    return data_source.num_rollout(options.num_epoch, options.rollout_batch_size)


def _sampling_params(config: Config) -> dict[str, Any]:
    options = config.rollout
    return {
        "temperature": options.rollout_temperature,
        "top_p": options.rollout_top_p,
        "top_k": options.rollout_top_k,
        "max_new_tokens": options.rollout_max_response_len,
        "stop": list(options.rollout_stop),
        "stop_token_ids": list(options.rollout_stop_token_ids),
        "skip_special_tokens": options.rollout_skip_special_tokens,
    }


def stop_token_ids(folder: Path, hf_config: dict[str, Any], tokenizer: Any) -> tuple[int, ...]:
    """The ends of sequence of generation_config.json, config.json and the tokenizer."""
    generation = folder / "generation_config.json"
    found: set[int] = set()
    for source in (json.loads(generation.read_text()) if generation.is_file() else {}, hf_config):
        ids = source.get("eos_token_id")
        found |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return tuple(sorted(found))


def _kv_tokens(inputs: _Inputs, checkpoint: Path | None, prediction: Prediction | None, workers: Workers) -> int:
    """Of the embedded engine: the option's; those of the checkpoint's run, if it had as many ranks; those that were
    planned for a GPU; or what there is room for."""
    config = inputs.config
    if config.rollout.rollout_max_tokens is not None:
        return config.rollout.rollout_max_tokens
    state = {} if checkpoint is None else read_state(checkpoint)
    if state.get("kv_tokens") is not None and state.get("num_ranks", 1) == config.cluster.num_ranks:
        return int(state["kv_tokens"])
    if prediction is not None and prediction.num_gpus and prediction.kv_tokens:
        return prediction.kv_tokens
    longest_evals = (_longest_eval(config, eval_set) for eval_set in inputs.eval_sets)
    return workers.kv_tokens(max([inputs.max_context_len, *longest_evals]))


def _longest_eval(config: Config, eval_set: EvalSet) -> int:
    """Tokens that one held-out prompt with its response may need, where prompts are limited at all."""
    longest_prompt = config.eval.eval_max_prompt_len or config.rollout.rollout_max_prompt_len or 0
    return min(eval_set.max_context_len, longest_prompt + int(eval_set.sampling_params["max_new_tokens"]))


def _check_tokenizer(tokenizer: Any, model: ModelConfig) -> None:
    largest = max(tokenizer.get_vocab().values())
    if largest >= model.vocab_size:
        raise ModelError(
            "--hf-checkpoint tokenizer",
            largest,
            f"its largest token id lies outside the model's vocabulary of {model.vocab_size}.",
            "Use the tokenizer that belongs to the model.",
        )
