"""Calling rollout and evaluation functions, ours or the user's."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

from lockstep.errors import RolloutError
from lockstep.run import Run
from lockstep.types import RolloutFnEvalOutput, RolloutFnTrainOutput, Sample


async def sample_groups(run: Run, rollout_id: int) -> RolloutFnTrainOutput:
    """One rollout, under the weights that the engine has.

    Raises:
        RolloutError: what the user's function returned cannot be trained on.
    """
    output = await _call(run, run.rollout_function, rollout_id)
    if not isinstance(output, RolloutFnTrainOutput):
        output = RolloutFnTrainOutput(output)
    if not _are_groups(output.samples, need_rewards=run.advantage_estimator is not None):
        raise RolloutError(
            "--rollout-function-path",
            run.config.rollout.rollout_function_path,
            f"it returned {output.samples!r:.80}, which is no list of groups of samples with rewards.",
            "Return RolloutFnTrainOutput(samples=[[Sample, ...], ...]).",
        )
    return output


async def sample_eval_sets(run: Run, rollout_id: int) -> RolloutFnEvalOutput:
    """One evaluation of every held-out set.

    Raises:
        RolloutError: the user's function returned something else.
    """
    assert run.eval_function is not None, "there is nothing to evaluate"
    give_newest_weights(run)
    output = await _call(run, run.eval_function, rollout_id, evaluation=True)
    if not isinstance(output, RolloutFnEvalOutput):
        output = RolloutFnEvalOutput(output)
    if not isinstance(output.data, dict) or not all(
        isinstance(results, dict) and "rewards" in results for results in output.data.values()
    ):
        raise RolloutError(
            "--eval-function-path",
            run.config.eval.eval_function_path or run.config.rollout.rollout_function_path,
            f"it returned {output.data!r:.80}, which is no dict of results by data set.",
            'Return RolloutFnEvalOutput(data={name: {"rewards": [...], "truncated": [...], "samples": [...]}}).',
        )
    return output


def give_newest_weights(run: Run) -> dict[str, float]:
    """Let the engine sample with the newest weights and no cache, whatever ran before in this process, so that a
    resumed run samples the same. Returns the time that this took, as a metric.

    Rollouts that overlap may be under way; the engine then says what becomes of their requests."""
    if run.engine is None:
        return {}
    version = run.trainer.version
    if run.overlaps and run.sampling_version == version:
        return {}
    started = time.perf_counter()
    run.engine.set_version(version)
    run.sampling_version = version
    return {"perf/update_weights_time": time.perf_counter() - started}


async def _call(run: Run, function: Callable[..., Any], rollout_id: int, **named: bool) -> Any:
    """Call a plain or async function with the run's rewards in reach.

    When the call ends, however it does, nothing of it is left under way; of rollouts that overlap, others are.
    """
    if run.context is not None:
        run.context.enter()
    try:
        result = function(run.args, rollout_id, run.data_source, **named)
        return await result if inspect.isawaitable(result) else result
    finally:
        if run.engine is not None and not run.overlaps:
            await run.engine.drain()


def _are_groups(groups: Any, *, need_rewards: bool) -> bool:
    if not groups or not isinstance(groups, list) or not all(isinstance(g, list) and g for g in groups):
        return False
    samples = [sample for group in groups for sample in group]
    return all(isinstance(s, Sample) and not (need_rewards and s.reward is None) for s in samples)
