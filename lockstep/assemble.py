"""From options to the objects of a run. Every choice between implementations is made here, once."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from lockstep.algorithms import AdvantageEstimator, loss_from_options, make_advantage_estimator
from lockstep.checkpoint.hf import load_hf_model, read_hf_config
from lockstep.checkpoint.training import find_checkpoint, read_state
from lockstep.config import Config
from lockstep.config.hooks import load_function, load_hook, load_optional_hook, our_path
from lockstep.config.model_flags import check_model_flags
from lockstep.data import load_tokenizer
from lockstep.data.chat import SftTokenizer
from lockstep.data.choose_source import DataSource, make_data_source
from lockstep.errors import ModelError, OptionError
from lockstep.models import LanguageModel, ModelConfig, read_model_config
from lockstep.rewards import RewardPool
from lockstep.rollout.embedded import EmbeddedEngine
from lockstep.rollout.embedded.caches import bytes_per_sequence, bytes_per_token
from lockstep.rollout.evaluation import EvalSet, load_eval_sets
from lockstep.rollout.generate import RolloutContext, generate_rollout
from lockstep.rollout.hooks import RolloutHooks
from lockstep.rollout.policy import Policy
from lockstep.rollout.sft import SftRollout
from lockstep.run import Run, resume_run
from lockstep.tracking.transfer import TransferProgress
from lockstep.trainer.local import LocalTrainer

_DEFAULT_ROLLOUT = "lockstep.rollout.generate.generate_rollout"
_KV_FRACTION = 0.3
"""Share of the free memory that the KV cache may take when neither option sets it."""


def pick_device(config: Config) -> torch.device:
    """The device that `--device` means.

    Raises:
        OptionError: a GPU is asked for and there is none.
    """
    wanted = config.cluster.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise OptionError(
            "--device", "cuda", "PyTorch sees no GPU here.", "Use --device cpu, or install a CUDA build of PyTorch."
        )
    return torch.device("cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu")


def assemble(config: Config, stack: AsyncExitStack, on_sample: Callable[[int], None]) -> Run:
    """Build a run; what must be closed again is pushed on `stack`.

    Args:
        on_sample: called with a number of samples that sampling or training has finished, for progress.
    """
    if config.cluster.num_threads:
        torch.set_num_threads(config.cluster.num_threads)
    _seed_generators(config.optimizer.seed)
    device = pick_device(config)
    hf_folder = Path(config.model.hf_checkpoint)
    hf_config = read_hf_config(hf_folder)
    check_model_flags(config, hf_config)
    model_config = read_model_config(hf_config)
    tokenizer: Any = load_tokenizer(hf_folder)
    _check_tokenizer(tokenizer, model_config)
    args = config.args()
    if config.reward.custom_rm_path is not None:
        load_function(config.reward.custom_rm_path, "--custom-rm-path")  # runs in workers; a typo is found here
    is_sft = config.algorithm.loss_type == "sft_loss"
    data_source = make_data_source(config, tokenizer)
    num_rollout = _num_rollout(config, data_source)
    max_context_len = _max_context_len(config, model_config)
    eval_sets = load_eval_sets(config, tokenizer, model_config.max_position_embeddings)
    hooks = RolloutHooks.from_config(config)
    samples_something = not config.debug.samples_nothing and (not is_sft or bool(eval_sets))

    dtype = getattr(torch, config.model.params_dtype)
    with TransferProgress("loading") as progress:
        model = load_hf_model(hf_folder, dtype=dtype, device=device, on_bytes=progress)
    trainer = LocalTrainer(
        model,
        reference=_reference(config, dtype, device),
        loss=loss_from_options(config.algorithm),
        optimizer=config.optimizer,
        batching=config.batching,
        temperature=1.0 if is_sft else config.rollout.rollout_temperature,
        needs_entropy=not is_sft,
        routing=_routing(config),
        num_steps=num_rollout * config.rollout.steps_per_rollout,
        on_micro_batch=on_sample,
    )
    checkpoint = find_checkpoint(Path(config.checkpoint.load)) if config.checkpoint.load else None
    engine, context, kv_tokens = None, None, None
    if samples_something:
        longest = max([max_context_len, *(_longest_eval(config, eval_set) for eval_set in eval_sets)])
        kv_tokens = _kv_tokens(config, model, longest, checkpoint)
        engine = _embedded_engine(
            config, stack.enter_context(trainer.rollout_weights()), tokenizer, kv_tokens, max_context_len
        )
        stack.callback(engine.close)
        context = RolloutContext(
            policy=Policy(
                engine=engine,
                tokenizer=tokenizer,
                stop_token_ids=_stop_token_ids(hf_folder, hf_config, tokenizer),
                max_context_len=max_context_len,
                skip_special_tokens=config.rollout.rollout_skip_special_tokens,
            ),
            rewards=RewardPool(
                args,
                num_workers=config.reward.reward_num_workers,
                timeout_s=config.reward.reward_timeout,
                failure_policy=config.reward.reward_failure_policy,
            ),
            hooks=hooks,
            sampling_params=_sampling_params(config),
            eval_sets=eval_sets,
            on_sample=lambda: on_sample(1),
        )
    rollout_function = _rollout_function(config.rollout.rollout_function_path, "--rollout-function-path")
    if is_sft and our_path(config.rollout.rollout_function_path) == _DEFAULT_ROLLOUT:
        rollout_function = SftRollout(SftTokenizer(tokenizer))
    eval_path = config.eval.eval_function_path or config.rollout.rollout_function_path
    run = Run(
        config=config,
        args=args,
        tokenizer=tokenizer,
        trainer=trainer,
        engine=engine,
        data_source=data_source,
        rollout_function=rollout_function,
        eval_function=_rollout_function(eval_path, "--eval-function-path") if eval_sets and context else None,
        context=context,
        advantage_estimator=None if is_sft else _advantage_estimator(config),
        reward_post_process=load_optional_hook(
            config.reward.custom_reward_post_process_path, "--custom-reward-post-process-path"
        ),
        data_postprocess=load_optional_hook(
            config.rollout.rollout_data_postprocess_path, "--rollout-data-postprocess-path"
        ),
        run_dir=Path(config.logging.run_dir),
        num_rollout=num_rollout,
        next_rollout_id=config.rollout.start_rollout_id or 0,
        kv_tokens=kv_tokens,
    )
    resume_run(run, checkpoint)
    return run


def _rollout_function(path: str, option: str) -> Callable[..., Any]:
    """Ours, or the user's, whose exceptions then name the option."""
    if our_path(path) == _DEFAULT_ROLLOUT:
        return generate_rollout
    return load_hook(path, option)


def _seed_generators(seed: int) -> None:
    """Start the global generators, which hooks may draw from, at the same place in every run."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _advantage_estimator(config: Config) -> AdvantageEstimator:
    options = config.algorithm
    return make_advantage_estimator(
        options.advantage_estimator,
        disable_rewards_normalization=options.disable_rewards_normalization,
        disable_grpo_std_normalization=options.disable_grpo_std_normalization,
    )


def _reference(config: Config, dtype: torch.dtype, device: torch.device) -> LanguageModel | None:
    if not config.algorithm.use_kl_loss:
        return None
    folder = Path(config.checkpoint.ref_load or config.model.hf_checkpoint)
    with TransferProgress("loading the reference") as progress:
        return load_hf_model(folder, dtype=dtype, device=device, on_bytes=progress).requires_grad_(False)


def _routing(config: Config) -> Any:
    if config.algorithm.use_rollout_routing_replay:
        return "rollout"
    return "old" if config.algorithm.use_routing_replay else "own"


def _num_rollout(config: Config, data_source: DataSource) -> int:
    """Rollouts of the whole run; 0 when neither option says it, which only evaluation allows."""
    options = config.rollout
    if options.num_rollout is not None or options.num_epoch is None:
        return options.num_rollout or 0
    return data_source.num_rollout(options.num_epoch, options.rollout_batch_size)


def _max_context_len(config: Config, model: ModelConfig) -> int:
    options = config.rollout
    limit = options.rollout_max_context_len
    if limit is None and options.rollout_max_prompt_len is not None:
        limit = options.rollout_max_prompt_len + options.rollout_max_response_len
    return min(limit or model.max_position_embeddings, model.max_position_embeddings)


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


def _stop_token_ids(folder: Path, hf_config: dict[str, Any], tokenizer: Any) -> tuple[int, ...]:
    """The ends of sequence of generation_config.json, config.json and the tokenizer."""
    generation = folder / "generation_config.json"
    found: set[int] = set()
    for source in (json.loads(generation.read_text()) if generation.is_file() else {}, hf_config):
        ids = source.get("eos_token_id")
        found |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return tuple(sorted(found))


def _embedded_engine(
    config: Config, model: LanguageModel, tokenizer: Any, kv_tokens: int, max_context_len: int
) -> EmbeddedEngine:
    options = config.rollout
    block_size = options.rollout_block_size
    return EmbeddedEngine(
        model,
        num_blocks=-(-kv_tokens // block_size),
        block_size=block_size,
        max_running=options.rollout_max_running_requests,
        max_prefill_tokens=max(16384, max_context_len),
        decode_text=partial(tokenizer.decode, skip_special_tokens=False),
        seed=config.data.rollout_seed,
    )


def _longest_eval(config: Config, eval_set: EvalSet) -> int:
    """Tokens that one held-out prompt with its response may need, where prompts are limited at all."""
    longest_prompt = config.eval.eval_max_prompt_len or config.rollout.rollout_max_prompt_len or 0
    return min(eval_set.max_context_len, longest_prompt + int(eval_set.sampling_params["max_new_tokens"]))


def _kv_tokens(config: Config, model: LanguageModel, max_context_len: int, checkpoint: Path | None) -> int:
    """Tokens of the KV cache: the option, else what the checkpoint's run had, else what the running requests can need,
    within a share of free memory."""
    options = config.rollout
    if options.rollout_max_tokens is not None:
        return options.rollout_max_tokens
    if checkpoint is not None and (earlier := read_state(checkpoint).get("kv_tokens")) is not None:
        return int(earlier)
    weight = model.lm_head.weight
    if weight.is_cuda:
        fraction = config.sglang.mem_fraction_static or _KV_FRACTION
        gradients_and_moments = 12 * sum(p.numel() for p in model.parameters())  # fp32, first made in training
        free_bytes = max(0, torch.cuda.mem_get_info(weight.device)[0] - gradients_and_moments)
    else:
        fraction, free_bytes = _KV_FRACTION, psutil.virtual_memory().available
    element_size = weight.element_size()
    states = options.rollout_max_running_requests * bytes_per_sequence(model.config, element_size)
    affordable = max(0, int(free_bytes * fraction) - states) // bytes_per_token(model.config, element_size)
    running = min(options.rollout_max_running_requests, max(options.samples_per_rollout, 1))
    return max(options.rollout_block_size, min(affordable, running * max_context_len))


def _check_tokenizer(tokenizer: Any, model: ModelConfig) -> None:
    largest = max(tokenizer.get_vocab().values())
    if largest >= model.vocab_size:
        raise ModelError(
            "--hf-checkpoint tokenizer",
            largest,
            f"its largest token id lies outside the model's vocabulary of {model.vocab_size}.",
            "Use the tokenizer that belongs to the model.",
        )
