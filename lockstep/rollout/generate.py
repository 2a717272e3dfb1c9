"""From prompts to scored groups: the built-in rollout and evaluation functions.

The choice of groups never looks at the clock: requests are admitted in (group, sample) order, groups are judged in the
order they were drawn, and what is not needed goes back into the buffer unstarted.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from numbers import Real
from typing import Any

from lockstep.errors import RolloutError
from lockstep.metrics import eval_metrics
from lockstep.rewards import FAILURES, RewardOutcome, RewardPool
from lockstep.rollout.evaluation import EvalSet
from lockstep.rollout.hooks import RolloutHooks
from lockstep.rollout.policy import Policy, current_policy, set_current_policy
from lockstep.types import Group, RolloutFnEvalOutput, RolloutFnTrainOutput, Sample

logger = logging.getLogger(__name__)

MAX_EMPTY_ROUNDS = 10
"""Rounds of prompts in a row that may end without one usable group before the run stops. It stops after the first one
where rewards fail and none has worked yet."""

_CONTEXT: ContextVar[RolloutContext] = ContextVar("rollout_context")


@dataclass(frozen=True)
class RolloutContext:
    """What the built-in rollout functions need beside their arguments."""

    policy: Policy
    rewards: RewardPool
    hooks: RolloutHooks
    sampling_params: dict[str, Any]
    eval_sets: list[EvalSet]
    on_sample: Callable[[], None] = lambda: None
    """Called for each finished sample, for progress."""

    def enter(self) -> None:
        """Make this the context of the calling task and of those it starts."""
        _CONTEXT.set(self)


@dataclass
class _Round:
    """Groups kept and lost so far in one rollout, and why."""

    kept: list[Group] = field(default_factory=list)
    dropped: list[Group] = field(default_factory=list)
    spare: list[Group] = field(default_factory=list)
    """Dropped by the filter, but better than nothing."""
    counts: Counter[str] = field(default_factory=Counter)
    first_failure: str = ""
    """Why the first reward failed that did."""
    begun: list[Group] = field(default_factory=list)
    """Interrupted, or complete but too late to be needed: the next round goes on with them."""

    def count_rewards(self, outcomes: list[RewardOutcome]) -> None:
        """Of groups that are judged, not in the pool: it also knows those that just had time enough before the cut."""
        for outcome in outcomes:
            if outcome.outcome in FAILURES:
                self.counts[f"reward_{outcome.outcome}"] += 1
                self.first_failure = self.first_failure or outcome.detail.partition("\n")[0]


async def generate_rollout(
    args: Any, rollout_id: int, data_source: Any, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """`--rollout-batch-size` finished, scored groups, or the evaluation of every held-out set."""
    context = _CONTEXT.get()
    if evaluation:
        return await _evaluate(args, rollout_id, context)
    set_current_policy(context.policy.for_stream(0, rollout_id))
    run_round = _run_interrupted_round if args.partial_rollout else _run_round
    state = _Round()
    started = time.perf_counter()
    empty_rounds = 0
    while len(state.kept) < args.rollout_batch_size:
        kept_before = len(state.kept)
        await run_round(args, rollout_id, data_source, context, state)
        while state.spare and len(state.kept) < args.rollout_batch_size:
            state.kept.append(state.spare.pop(0))
        empty_rounds = 0 if len(state.kept) > kept_before else empty_rounds + 1
        if empty_rounds and state.first_failure and not context.rewards.has_scored:
            num_failed = sum(state.counts[f"reward_{outcome}"] for outcome in FAILURES)
            raise RolloutError(
                "reward",
                f"{num_failed} failures",
                f"no reward has worked so far; the first failed with: {state.first_failure}.",
                "Fix the reward, or give it longer (--reward-timeout).",
            )
        if empty_rounds == MAX_EMPTY_ROUNDS:
            raise RolloutError(
                "rollout",
                ", ".join(f"{count} {name}" for name, count in state.counts.items()),
                f"{empty_rounds} rounds of prompts left no group to train on"
                f"{f', and a reward failed: {state.first_failure}' if state.first_failure else ''}.",
                "Look at the dynamic sampling filter, the reward and --reward-failure-policy.",
            )
    if args.partial_rollout:
        _keep_for_later(rollout_id, data_source, state)
    if state.first_failure:
        logger.warning("Rewards of rollout %d failed, the first with: %s", rollout_id, state.first_failure)
    if context.hooks.sample_filter is not None:
        context.hooks.sample_filter(args, state.kept)
    if context.hooks.all_samples_process is not None:
        context.hooks.all_samples_process(args, state.kept + state.dropped + state.spare, data_source)
    metrics = dict.fromkeys((f"rollout/reward_{outcome}" for outcome in FAILURES), 0.0)
    metrics |= {f"rollout/{name}": float(value) for name, value in state.counts.items()}
    metrics["rollout/prompts_trained"] = float(len(state.kept))
    metrics["perf/rollout_time"] = time.perf_counter() - started
    _add_cache_metrics(metrics, state.kept)
    return RolloutFnTrainOutput(state.kept, metrics)


async def _run_round(args: Any, rollout_id: int, data_source: Any, context: RolloutContext, state: _Round) -> None:
    """Draw one round of prompts and judge its groups in drawing order, until the rollout has enough."""
    drawn: list[Group] = data_source.get_samples(args.over_sampling_batch_size)
    pristine = copy.deepcopy(drawn)
    state.counts["prompts_drawn"] += len(drawn)
    finishing = (_finish_group(args, group, rollout_id, context, context.sampling_params) for group in drawn)
    tasks = [asyncio.create_task(finish) for finish in finishing]
    try:
        for position, task in enumerate(tasks):
            if len(state.kept) == args.rollout_batch_size:
                unused = pristine[position:]
                data_source.add_samples(unused)
                state.counts["prompts_deferred"] += len(unused)
                return
            group, outcomes = await task
            state.count_rewards(outcomes)
            _judge(args, group, context.hooks, state)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _run_interrupted_round(
    args: Any, rollout_id: int, data_source: Any, context: RolloutContext, state: _Round
) -> None:
    """Go on with interrupted groups and new ones until as many as are missing are complete; interrupt the others.

    Which ones are complete follows from the order in which the engine ends them, never from the time that rewards take.
    """
    missing = args.rollout_batch_size - len(state.kept)
    groups, state.begun = state.begun, []
    while len(groups) < missing:
        drawn: list[Group] = data_source.get_samples(args.over_sampling_batch_size)
        state.counts["prompts_drawn"] += len(drawn)
        _take_up(args, drawn, state)
        groups += drawn
    policy = current_policy().interruptible()
    set_current_policy(policy)
    complete: list[int] = []
    interrupting: list[asyncio.Task[None]] = []

    def on_generated(position: int) -> None:
        complete.append(position)
        if len(complete) == missing:
            interrupting.append(asyncio.create_task(policy.interrupt()))

    results = await _gather(
        [
            _finish_group(
                args, group, rollout_id, context, context.sampling_params, on_generated=partial(on_generated, position)
            )
            for position, group in enumerate(groups)
        ]
    )
    await asyncio.gather(*interrupting)
    for position in complete[:missing]:
        group, outcomes = results[position]
        state.count_rewards(outcomes)
        _judge(args, group, context.hooks, state)
    state.begun = [group for position, (group, _) in enumerate(results) if position not in complete[:missing]]


def _take_up(args: Any, groups: list[Group], state: _Round) -> None:
    """Count what earlier rollouts have written, and hide it from the loss where that is asked for."""
    continued = [sample for group in groups for sample in group if sample.response_length]
    state.counts["samples_continued"] += len(continued)
    if args.mask_offpolicy_in_partial_rollout:
        for sample in continued:
            sample.loss_mask = [0] * sample.response_length


def _keep_for_later(rollout_id: int, data_source: Any, state: _Round) -> None:
    begun = [sample for group in state.begun for sample in group if sample.response_length]
    for sample in begun:
        sample.metadata.setdefault("start_rollout_id", rollout_id)
    state.counts["prompts_deferred"] += len(state.begun)
    state.counts["samples_deferred"] += len(begun)
    data_source.add_samples(state.begun)


def _judge(args: Any, group: Group, hooks: RolloutHooks, state: _Round) -> None:
    scored = [sample for sample in group if sample.reward is not None]
    needs_group = not args.disable_rewards_normalization
    if len({sample.rollout_id for sample in scored}) < (2 if needs_group else 1):
        state.counts["prompts_failed"] += 1
        state.counts["groups_dropped_too_small"] += 1
        state.dropped.append(group)
        return
    verdict = hooks.verdict(args, scored)
    if verdict.keep:
        state.kept.append(scored)
        return
    state.counts["prompts_filtered"] += 1
    state.counts[f"dynamic_filter/drop_{verdict.reason or 'no_reason'}"] += 1
    (state.spare if verdict.keep_when_insufficient else state.dropped).append(scored)


async def _finish_group(
    args: Any,
    group: Group,
    rollout_id: int,
    context: RolloutContext,
    sampling_params: dict[str, Any],
    *,
    evaluation: bool = False,
    on_generated: Callable[[], None] = lambda: None,
) -> tuple[Group, list[RewardOutcome]]:
    """Generate and score every sample of a group; samples whose reward was dropped keep the reward None.

    Args:
        on_generated: called when the last sample is written, before it is scored; never if one was interrupted.
    """
    missing = len(group)

    def on_sample_generated() -> None:
        nonlocal missing
        missing -= 1
        if missing == 0:
            on_generated()

    finished = await _gather(
        [
            _finish_sample(
                args, s, rollout_id, context, sampling_params, evaluation=evaluation, on_generated=on_sample_generated
            )
            for s in group
        ]
    )
    samples = [sample for siblings, _ in finished for sample in siblings]
    outcomes = [outcome for _, outcomes in finished for outcome in outcomes]
    if args.group_rm and not any(_is_interrupted(sample) for sample in samples):
        outcomes = await context.rewards.score_group(samples, evaluation=evaluation)
    for sample in samples:
        _require_number(sample, _reward_value(args, sample, evaluation=evaluation))
    return samples, outcomes


async def _finish_sample(
    args: Any,
    sample: Sample,
    rollout_id: int,
    context: RolloutContext,
    sampling_params: dict[str, Any],
    *,
    evaluation: bool,
    on_generated: Callable[[], None],
) -> tuple[list[Sample], list[RewardOutcome]]:
    if args.partial_rollout and not evaluation and _is_written(sample):
        on_generated()  # in an earlier round
        siblings = [sample]
    else:
        siblings = await _call_generate(args, sample, context.hooks, dict(sampling_params), evaluation)
        if any(_is_interrupted(s) for s in siblings):
            return siblings, []
        on_generated()
        siblings = [
            await context.hooks.before_reward(args, s, rollout_id=rollout_id, evaluation=evaluation) for s in siblings
        ]
    outcomes: list[RewardOutcome] = []
    if not args.group_rm:
        unscored = [s for s in siblings if s.reward is None]
        outcomes = await _gather([context.rewards.score(s, evaluation=evaluation) for s in unscored])
    context.on_sample()
    return siblings, outcomes


async def _call_generate(
    args: Any, sample: Sample, hooks: RolloutHooks, sampling_params: dict[str, Any], evaluation: bool
) -> list[Sample]:
    custom = hooks.generate_function(sample)
    if custom is None:
        result: Any = await generate(args, sample, sampling_params)
    elif "evaluation" in inspect.signature(custom).parameters:
        result = await custom(args, sample, sampling_params, evaluation=evaluation)
    else:
        result = await custom(args, sample, sampling_params)
    siblings: list[Sample] = result if isinstance(result, list) else [result]
    if not all(isinstance(s, Sample) for s in siblings):
        raise RolloutError(
            "--custom-generate-function-path",
            repr(result)[:80],
            "it returned neither a Sample nor a list of them.",
            "Return the sample it was given.",
        )
    for sibling in siblings:
        sibling.rollout_id = sample.rollout_id
    return siblings


async def generate(args: Any, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False) -> Sample:
    """Single turn: the prompt, then one response, or the rest of one that an earlier rollout began."""
    policy = current_policy()
    policy.start(sample)
    begun = sample.response_length
    if begun >= sampling_params["max_new_tokens"]:
        sample.status = Sample.Status.TRUNCATED
        return sample
    if begun:
        rest = {"max_new_tokens": sampling_params["max_new_tokens"] - begun, "continued_tokens": begun}
        rest["min_new_tokens"] = max(0, sampling_params.get("min_new_tokens", 0) - begun)
        sampling_params = sampling_params | rest
    await policy.extend(sample, sampling_params)
    if begun:
        sample.response = policy.text(sample.tokens[-sample.response_length :])
    return sample


async def _evaluate(args: Any, rollout_id: int, context: RolloutContext) -> RolloutFnEvalOutput:
    """Sample and score every held-out set. Each evaluation uses the same random streams, so that two of them differ
    by their weights alone."""
    data: dict[str, dict[str, Any]] = {}
    for number, eval_set in enumerate(context.eval_sets):
        set_current_policy(replace(context.policy.for_stream(1, number), max_context_len=eval_set.max_context_len))
        groups = [list(group) for _, group in groupby(copy.deepcopy(eval_set.samples), key=lambda s: s.group_index)]
        finished = await _gather(
            [
                _finish_group(args, group, rollout_id, context, eval_set.sampling_params, evaluation=True)
                for group in groups
            ]
        )
        last_siblings = {sample.rollout_id: sample for group, _ in finished for sample in group}
        samples = list(last_siblings.values())
        data[eval_set.name] = {
            "rewards": [float(_reward_value(args, s, evaluation=True) or 0.0) for s in samples],
            "truncated": [s.status is Sample.Status.TRUNCATED for s in samples],
            "samples": samples,
        }
    return RolloutFnEvalOutput(data, eval_metrics(data, args))


def _is_interrupted(sample: Sample) -> bool:
    return sample.status is Sample.Status.ABORTED


def _is_written(sample: Sample) -> bool:
    """Whether its response is whole: only its group has to go on."""
    return sample.response_length > 0 and sample.status in (Sample.Status.COMPLETED, Sample.Status.TRUNCATED)


def _reward_value(args: Any, sample: Sample, *, evaluation: bool) -> Any:
    """The number that counts, None for a sample that lost its reward."""
    key = (evaluation and args.eval_reward_key) or args.reward_key
    return sample.reward.get(key) if key and isinstance(sample.reward, dict) else sample.reward


def _require_number(sample: Sample, value: Any) -> None:
    if sample.reward is None or (isinstance(value, Real) and math.isfinite(value)):
        return
    raise RolloutError(
        f"reward of sample {sample.index}",
        sample.reward,
        "it is not a finite number, nor does it hold one under --reward-key.",
        "Return a number, or a dict together with --reward-key.",
    )


def _add_cache_metrics(metrics: dict[str, float], groups: list[Group]) -> None:
    samples = [sample for group in groups for sample in group]
    cached = sum(sample.metadata.get("cached_tokens", 0) for sample in samples)
    given = sum(sample.metadata.get("given_tokens", 0) for sample in samples)
    metrics["rollout/avg_cached_tokens_per_sample"] = cached / len(samples)
    metrics["rollout/prefix_cache_hit_rate"] = cached / given if given else 0.0


async def _gather(coroutines: list[Any]) -> list[Any]:
    """Results in input order; the first failure cancels the others."""
    tasks = [asyncio.ensure_future(c) for c in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
