"""The user's functions of one run, imported once and called by slime's signatures."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from lockstep.config import Config
from lockstep.config.hooks import load_hook, load_optional_hook
from lockstep.errors import RolloutError
from lockstep.types import DynamicFilterOutput, Group, Sample

GenerateFunction = Callable[..., Awaitable["Sample | list[Sample]"]]


@dataclass(frozen=True)
class RolloutHooks:
    """Functions named by options; None where the option is not set."""

    generate: GenerateFunction | None
    dynamic_filter: Callable[..., Any] | None
    sample_hooks: tuple[Callable[..., Any], ...]
    sample_filter: Callable[..., None] | None
    all_samples_process: Callable[..., None] | None

    @classmethod
    def from_config(cls, config: Config) -> RolloutHooks:
        options = config.rollout
        return cls(
            generate=load_optional_hook(options.custom_generate_function_path, "--custom-generate-function-path"),
            dynamic_filter=load_optional_hook(options.dynamic_sampling_filter_path, "--dynamic-sampling-filter-path"),
            sample_hooks=tuple(
                load_hook(path, "--rollout-sample-hook-path") for path in options.rollout_sample_hook_path
            ),
            sample_filter=load_optional_hook(options.rollout_sample_filter_path, "--rollout-sample-filter-path"),
            all_samples_process=load_optional_hook(
                options.rollout_all_samples_process_path, "--rollout-all-samples-process-path"
            ),
        )

    def generate_function(self, sample: Sample) -> GenerateFunction | None:
        """The sample's own generate function, else the run's."""
        if sample.generate_function_path:
            return load_hook(sample.generate_function_path, "generate_function_path")
        return self.generate

    def verdict(self, args: Any, group: Group) -> DynamicFilterOutput:
        """What the dynamic sampling filter says of a finished group; without a filter it is kept."""
        if self.dynamic_filter is None:
            return DynamicFilterOutput(keep=True)
        answer = self.dynamic_filter(args, group)
        if isinstance(answer, bool):
            return DynamicFilterOutput(keep=answer)
        if isinstance(answer, DynamicFilterOutput):
            return answer
        raise RolloutError(
            "--dynamic-sampling-filter-path",
            repr(answer)[:80],
            "the filter returned neither a bool nor a DynamicFilterOutput.",
            "Return DynamicFilterOutput(keep=..., reason=...).",
        )

    async def before_reward(self, args: Any, sample: Sample, *, rollout_id: int, evaluation: bool) -> Sample:
        for hook in self.sample_hooks:
            answer = hook(args, sample, rollout_id=rollout_id, evaluation=evaluation)
            if inspect.isawaitable(answer):
                answer = await answer
            sample = sample if answer is None else answer
            if not isinstance(sample, Sample):
                raise RolloutError(
                    "--rollout-sample-hook-path",
                    repr(sample)[:80],
                    "the hook returned neither a Sample nor None.",
                    "Return the sample, or nothing to keep it.",
                )
        return sample


def check_nonzero_std(args: Any, samples: Group, **_: Any) -> DynamicFilterOutput:
    """Keep groups whose rewards differ: the filter of DAPO (arXiv:2503.14476), as slime ships it."""
    rewards = [sample.get_reward_value(args) for sample in samples]
    keep = len(set(rewards)) > 1
    return DynamicFilterOutput(keep=keep, reason=None if keep else f"zero_std_{round(rewards[0], 1)}")
