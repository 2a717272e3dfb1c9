"""The training loop: sample, score, train, and the new weights are what samples next."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path

import torch

from lockstep.assemble import assemble
from lockstep.checkpoint.hf import require_replaceable
from lockstep.checkpoint.training import find_checkpoint
from lockstep.config import Config
from lockstep.errors import CheckpointError, writing
from lockstep.metrics import staleness_metrics
from lockstep.observer import Clock, Observer
from lockstep.parity import measure_parity, require_parity, require_same_bits
from lockstep.report import write_report
from lockstep.rollout.debug_data import load_rollout, save_rollout, save_train_data
from lockstep.run import FinishedRollout, Run, only_writer, open_records, require_writable, save_run
from lockstep.sampling import give_newest_weights, sample_eval_sets, sample_groups
from lockstep.schedule import Rollouts
from lockstep.stopping import GracefulStop, Interrupted
from lockstep.tracking.jsonl import plain_metrics
from lockstep.tracking.progress import RunProgress
from lockstep.trainer.engine import LogProbs
from lockstep.training_data import TrainingData, make_training_data
from lockstep.types import Group

STOPPED = 130
"""Exit code of a run that was asked to stop and has saved where it was."""


def train(config: Config) -> int:
    """Run `lockstep train`; returns the exit code."""
    run_dir = Path(config.logging.run_dir)
    folders = {"--run-dir": run_dir}
    if config.checkpoint.save is not None:
        folders["--save"] = Path(config.checkpoint.save)
    for option, folder in folders.items():
        require_writable(option, folder)
    if config.checkpoint.save_hf is not None:
        target = Path(config.checkpoint.save_hf.format(rollout_id=0))
        require_replaceable(target, source=Path(config.model.hf_checkpoint))
    with only_writer(folders):
        code = asyncio.run(_with_run(config, _train))
        if (run_dir / "metrics.jsonl").stat().st_size:
            with writing(run_dir):
                print(f"report {write_report(run_dir)}")
    return code


def evaluate(config: Config) -> int:
    """Run `lockstep eval`: every held-out set once, under the loaded weights. Writes nothing.

    Raises:
        CheckpointError: `--load` names a folder without a checkpoint.
    """
    load = config.checkpoint.load
    if load is not None and find_checkpoint(Path(load)) is None:
        raise CheckpointError(
            "--load",
            load,
            "there is no checkpoint to evaluate.",
            "Give the --save folder of a run, or leave it out to evaluate --hf-checkpoint.",
        )
    return asyncio.run(_with_run(config, _evaluate_only))


async def _train(run: Run, observer: Observer, stop: GracefulStop) -> int:
    options = run.config
    for folder in open_records(run):
        observer.note(f"what an earlier run left was moved to {folder}")
    if run.checkpoint is not None:
        observer.recall()
        observer.note(f"going on after step {run.next_rollout_id} of {run.num_rollout}, from {run.checkpoint}")
    elif options.checkpoint.load is not None:
        observer.note(f"{options.checkpoint.load} holds no checkpoint yet: this run begins with --hf-checkpoint")
    async with _rollouts(run, observer) as rollouts:
        if run.unlogged is not None:
            await finish_step(run, observer, stop, rollouts, run.unlogged)
        elif run.next_rollout_id == 0 and run.eval_function is not None and not options.eval.skip_eval_before_train:
            observer.log(-1, await stop.abandonable(run_eval(run, observer, -1)))
        if run.next_rollout_id >= run.num_rollout:
            observer.note(
                f"nothing is left to do: {run.next_rollout_id} of {run.num_rollout} rollouts are done "
                "(--num-rollout counts from the beginning)"
            )
        for rollout_id in range(run.next_rollout_id, run.num_rollout):
            border = rollouts.state()
            try:
                with observer.clock.waiting(options.rollout.samples_per_rollout):
                    rollout = await stop.abandonable(rollouts.take(rollout_id))
                metrics = rollout.metrics
                if not options.debug.debug_rollout_only:
                    metrics = metrics | await rollouts.beside(train_on, run, observer, rollout_id, rollout.groups)
            except Exception:
                if run.trainer.version == border["trainer"]["version"]:
                    save(run, observer, border)
                raise
            run.next_rollout_id = rollout_id + 1
            await finish_step(run, observer, stop, rollouts, metrics)
    for line in run.memory.summary():
        observer.note(line)
    return 0


def _rollouts(run: Run, observer: Observer) -> Rollouts:
    return Rollouts(
        run,
        partial(run_rollout, run, observer),
        partial(give_newest_weights, run),
        max_staleness=run.config.rollout.staleness_bound,
        overlap=run.overlaps,
        now=observer.clock.now,
    )


async def finish_step(
    run: Run, observer: Observer, stop: GracefulStop, rollouts: Rollouts, metrics: dict[str, float]
) -> None:
    """Evaluate, log and save, where it is time, after the step before `run.next_rollout_id`.

    Raises:
        ParityError: sampler and trainer disagreed in this step; it is logged, for the report, but not saved.
        Interrupted: the user asked to stop; the checkpoint is written.
    """
    options, rollout_id = run.config, run.next_rollout_id - 1
    is_last = run.next_rollout_id == run.num_rollout
    if run.eval_function is not None and is_due(rollout_id, options.eval.eval_interval, is_last):
        run.unlogged = plain_metrics(metrics)
        try:
            await stop.abandonable(rollouts.settle())
            metrics = metrics | await stop.abandonable(run_eval(run, observer, rollout_id))
        except Exception:
            save(run, observer, rollouts.state())
            raise
        run.unlogged = None
    observer.log(rollout_id, metrics)
    require_parity(metrics, options.algorithm.logprob_diff_limit)
    if is_due(rollout_id, options.checkpoint.save_interval, is_last) or stop.requested:
        with suppress(Interrupted):
            await stop.abandonable(rollouts.settle())
        await rollouts.beside(save, run, observer, rollouts.state())
    if stop.requested and not is_last:
        raise Interrupted


async def run_rollout(run: Run, observer: Observer, rollout_id: int) -> FinishedRollout:
    """Finished, scored groups: sampled now, or loaded from an earlier run."""
    debug = run.config.debug
    if debug.load_debug_rollout_data is not None:
        groups = load_rollout(
            debug.load_debug_rollout_data, rollout_id, subsample=debug.load_debug_rollout_data_subsample
        )
        return FinishedRollout(groups, observer.rollout(rollout_id, groups, {}))
    with observer.clock.sampling(run.config.rollout.samples_per_rollout):
        output = await sample_groups(run, rollout_id)
    if debug.save_debug_rollout_data is not None:
        save_rollout(debug.save_debug_rollout_data, rollout_id, output.samples)
    return FinishedRollout(output.samples, observer.rollout(rollout_id, output.samples, output.metrics or {}))


def train_on(run: Run, observer: Observer, rollout_id: int, groups: list[Group]) -> dict[str, float]:
    """The optimizer steps of one rollout; afterwards the sampler sees the new weights."""
    data = make_training_data(
        groups,
        run.args,
        run.advantage_estimator,
        run.reward_post_process,
        num_steps=run.config.rollout.steps_per_rollout,
    )
    if run.data_postprocess is not None:
        run.data_postprocess(run.args, rollout_id, data)
    if run.config.debug.save_debug_train_data is not None:
        save_train_data(run.config.debug.save_debug_train_data, rollout_id, data.train_samples)
    version = run.trainer.version
    staleness = staleness_metrics(data.samples, version, run.config.rollout.steps_per_rollout)
    before = prepare_log_probs(run, observer, data)
    with observer.clock.phase("train", len(data.samples), "perf/actor_train_time"):
        results = [run.trainer.step(step) for step in data.steps]
        run.trainer.finish_update()
    policy = before or results[0].policy
    metrics = staleness | observer.train(data, results, policy)
    parity = measure_parity(data.samples, policy, version)
    if parity is not None:
        metrics |= parity.metrics()
    if run.config.algorithm.true_on_policy:
        require_same_bits(data.samples, policy, version)
    observer.keep_samples(rollout_id, data, policy)
    update_interval = run.config.algorithm.ref_update_interval
    if update_interval is not None and (rollout_id + 1) % update_interval == 0:
        run.trainer.update_reference()
    return metrics


def prepare_log_probs(run: Run, observer: Observer, data: TrainingData) -> list[LogProbs] | None:
    """Fill in the old and the reference log-probs that the loss needs.

    With one optimizer step per rollout the old policy is the training forward itself, detached: no pass is spent.
    Returns the policy's log-probs before the first step where a pass was spent on them.
    """
    algorithm, samples = run.config.algorithm, data.train_samples
    before = None
    if len(data.steps) > 1 or algorithm.use_routing_replay:
        with observer.clock.phase("old log-probs", len(samples), "perf/log_probs_time"):
            before = run.trainer.log_probs(samples)
        for sample, old in zip(samples, before, strict=True):
            sample.old_log_probs = old.log_probs
    if algorithm.use_rollout_logprobs:
        for sample in samples:
            sample.old_log_probs = torch.tensor(sample.rollout_log_probs)
    if algorithm.use_kl_loss:
        with observer.clock.phase("reference log-probs", len(samples), "perf/ref_log_probs_time"):
            for sample, ref in zip(samples, run.trainer.log_probs(samples, reference=True), strict=True):
                sample.ref_log_probs = ref.log_probs
    return before


async def run_eval(run: Run, observer: Observer, rollout_id: int) -> dict[str, float]:
    """Metrics of every held-out set under the current weights; nothing when there is none."""
    if run.eval_function is None or run.context is None:
        return {}
    total = sum(len(eval_set.samples) for eval_set in run.context.eval_sets)
    with observer.clock.phase("eval", total, "perf/eval_time"):
        output = await sample_eval_sets(run, rollout_id)
    if run.config.debug.save_debug_rollout_data is not None:
        sets = [results.get("samples", []) for results in output.data.values()]
        save_rollout(run.config.debug.save_debug_rollout_data, f"eval_{rollout_id}", sets)
    return observer.evaluation(rollout_id, output)


def save(run: Run, observer: Observer, state: dict[str, object]) -> None:
    """Write a checkpoint, if the run keeps any, and say where."""
    clock = observer.clock
    with clock.phase("save", None, "perf/save_model_time"), clock.progress.transfer("exporting") as on_exported:
        folder = save_run(run, state, on_exported)
    if folder is not None:
        observer.note(f"saved {folder}")


def is_due(rollout_id: int, interval: int | None, is_last: bool) -> bool:
    """Whether something that happens every `interval` rollouts, and at the end, happens after this one."""
    return is_last or (interval is not None and (rollout_id + 1) % interval == 0)


async def _evaluate_only(run: Run, observer: Observer, stop: GracefulStop) -> int:
    if run.checkpoint is not None:
        print(f"evaluating {run.checkpoint}", file=sys.stderr, flush=True)
    metrics = await stop.abandonable(run_eval(run, observer, run.next_rollout_id - 1))
    for name, value in metrics.items():
        print(f"{name} {value:.4f}")
    return 0


async def _with_run(config: Config, work: Callable[[Run, Observer, GracefulStop], Awaitable[int]]) -> int:
    """Build the run, do the work, take everything down again whatever happens."""
    async with AsyncExitStack() as stack:
        progress = RunProgress(config.logging.run_dir, config.rollout.num_rollout or 0)
        clock = Clock(progress)
        clock.is_ahead = config.rollout.staleness_bound > 0
        run = assemble(config, stack, on_sampled=clock.sampled, on_trained=clock.trained)
        clock.memory = run.memory
        progress.num_steps, progress.start_step = run.num_rollout, run.next_rollout_id
        if run.context is not None:
            await stack.enter_async_context(run.context.rewards)
        stack.enter_context(progress)
        stop = stack.enter_context(GracefulStop(progress.message))
        stack.callback(lambda: run.trackers.close())
        try:
            return await work(run, Observer(run, clock), stop)
        except Interrupted:
            if work is _train:
                progress.message(_after_stop(run))
            return STOPPED


def _after_stop(run: Run) -> str:
    save = run.config.checkpoint.save
    if save is None:
        return "nothing was saved: there is no --save"
    if run.next_rollout_id == 0:
        return "nothing was saved: no step was finished"
    return f"to go on, repeat the command with --load {save}"
