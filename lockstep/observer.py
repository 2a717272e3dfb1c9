"""What a run shows and keeps: phases with their times, metrics of every step, samples for the report."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from itertools import islice
from typing import Any

from lockstep import metrics as declared
from lockstep.config.hooks import load_optional_hook
from lockstep.errors import writing
from lockstep.plan.meter import MemoryMeter, NoMeter
from lockstep.report.samples import write_samples
from lockstep.rewards import FAILURES, Outcome
from lockstep.run import Run
from lockstep.tracking.jsonl import FILE_NAME, read_steps
from lockstep.tracking.progress import Phase, RunProgress
from lockstep.trainer.engine import LogProbs, StepResult
from lockstep.training_data import TrainingData
from lockstep.types import Group, RolloutFnEvalOutput, Sample

KEPT_SAMPLES = 64
"""Samples of each rollout that are written for the report; whole groups, the first ones."""


_MEASURED = {
    "perf/rollout_time": "rollout",
    "perf/rollout_wait_time": "rollout",
    "perf/eval_time": "rollout",
    "perf/log_probs_time": "log_probs",
    "perf/ref_log_probs_time": "log_probs",
    "perf/actor_train_time": "train",
    "perf/save_model_time": "save",
}
"""Metric of a phase's time -> the name under which its memory is measured."""


class Clock:
    """Seconds by metric name, added up until they are taken; and the phase that is on show, with its memory."""

    def __init__(self, progress: RunProgress) -> None:
        self.progress = progress
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._marks: dict[str, float] = {}
        self.is_ahead = False
        """Whether rollouts are sampled beside training."""
        self._phase: Phase | None = None
        self._phase_samples = False
        self._began = self._started = time.perf_counter()
        self.memory: MemoryMeter = NoMeter()

    @contextmanager
    def phase(self, name: str, total: int | None, metric: str) -> Iterator[None]:
        """Show and time a part of a step."""
        started = time.perf_counter()
        if metric == "perf/actor_train_time":
            self._marks["perf/train_started_at"] = self.now()
        self.memory.start()
        with self.progress.phase(name, total) as phase:
            self._phase, self._phase_samples = phase, _MEASURED[metric] == "rollout"
            try:
                yield
            finally:
                self._phase = None
                self._seconds[metric] += time.perf_counter() - started
                if metric == "perf/actor_train_time":
                    self._marks["perf/train_ended_at"] = self.now()
                self.memory.stop(_MEASURED[metric])

    def sampling(self, total: int) -> AbstractContextManager[None]:
        """The phase in which a rollout is sampled; none of its own where others go on beside it."""
        return nullcontext() if self.is_ahead else self.phase("rollout", total, "perf/rollout_time")

    def waiting(self, total: int) -> AbstractContextManager[None]:
        """The phase in which training waits for a rollout that is sampled beside it."""
        return self.phase("rollout", total, "perf/rollout_wait_time") if self.is_ahead else nullcontext()

    def sampled(self) -> None:
        """One more sample has its reward."""
        if self._phase is not None and self._phase_samples:
            self._phase.advance()

    def trained(self, count: int) -> None:
        """More samples have been through the model."""
        if self._phase is not None and not self._phase_samples:
            self._phase.advance(count)

    def now(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._began

    def take(self) -> dict[str, float]:
        """Times since the last call, with slime's sums: training, waiting for it, and the whole step."""
        now = time.perf_counter()
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        step_time, self._started = now - self._started, now
        training = ("perf/log_probs_time", "perf/ref_log_probs_time", "perf/actor_train_time")
        train_time = sum(seconds.get(name, 0.0) for name in training)
        marks, self._marks = self._marks, {}
        return (
            seconds
            | marks
            | {
                "perf/train_time": train_time,
                "perf/train_wait_time": step_time - train_time,
                "perf/step_time": step_time,
                "perf/wait_time_ratio": 1 - train_time / step_time,
            }
        )


class Observer:
    """Turns what the loop hands over into metrics, and sends them where the user looks."""

    def __init__(self, run: Run, clock: Clock) -> None:
        self.run = run
        self.clock = clock
        logging = run.config.logging
        self._kept: list[dict[str, Any]] = []
        self._silent_steps = 0
        self._token_text = cache(lambda token: run.tokenizer.decode([token]))
        self._rollout_log = load_optional_hook(
            logging.custom_rollout_log_function_path, "--custom-rollout-log-function-path"
        )
        self._eval_log = load_optional_hook(
            logging.custom_eval_rollout_log_function_path, "--custom-eval-rollout-log-function-path"
        )

    def rollout(self, rollout_id: int, groups: list[Group], reported: dict[str, Any]) -> dict[str, float]:
        """Metrics of a rollout's samples, its rewards and its data, and those that the rollout function reported."""
        run = self.run
        rollout_time = reported.get("perf/rollout_time", 0.0)
        if self._rollout_log is not None:
            samples = [sample for group in groups for sample in group]
            if self._rollout_log(rollout_id, run.args, samples, reported, rollout_time):
                return {}
        metrics = declared.rollout_metrics(groups, run.args) | {"rollout/step": float(rollout_id)}
        if rollout_time:
            num_gpus = run.config.cluster.num_ranks
            metrics |= declared.rollout_perf_metrics(groups, rollout_time, num_gpus)
        if run.context is not None:
            counts = run.context.rewards.take_counts()
            metrics |= {f"rollout/reward_{outcome}": float(counts[outcome]) for outcome in FAILURES}
            scored = sum(counts[outcome] for outcome in Outcome)
            if scored and counts["no_thinking_end"] == scored:
                self.note(
                    "every reward of this step is 0 because no response holds </think> or ###Response, which "
                    "--rm-type deepscaler asks for; use --rm-type math for models that do not think aloud"
                )
        counters = run.data_source.counters
        metrics["rollout/overlong_prompts"] = float(counters["over_long_prompts"])
        metrics["rollout/malformed_rows"] = float(counters["malformed_rows"])
        declared.check(metrics)
        return metrics | reported

    def train(self, data: TrainingData, results: list[StepResult], policy: list[LogProbs]) -> dict[str, float]:
        """Metrics of a rollout's optimizer steps: means over them, sums of counts, the last learning rate."""
        metrics: dict[str, float] = {}
        for name in results[0].metrics:
            values = [result.metrics[name] for result in results]
            metrics[name] = sum(values) / len(values)
            if name == "train/skipped_steps":
                metrics[name] = sum(values)
            elif name.startswith("train/lr"):
                metrics[name] = values[-1]
        masks = [sample.loss_mask for sample in data.train_samples]
        metrics["train/step"] = float(self.run.trainer.version)
        metrics["rollout/log_probs"] = declared.token_mean_per_sample([p.log_probs.tolist() for p in policy], masks)
        references = [s.ref_log_probs for s in data.train_samples if s.ref_log_probs is not None]
        if references:
            metrics["rollout/ref_log_probs"] = declared.token_mean_per_sample([r.tolist() for r in references], masks)
        if self.run.advantage_estimator is not None:
            advantages = [sample.advantage for sample in data.train_samples]
            of_advantages = ("rollout/advantages", "rollout/returns", "rollout/rewards")
            metrics |= dict.fromkeys(of_advantages, sum(advantages) / len(advantages))
            self._note_silence(advantages)
        if self.run.config.logging.log_correct_samples:
            log_probs = [p.log_probs.tolist() for p in policy]
            metrics |= declared.correct_sample_metrics(data.samples, log_probs, self.run.args)
        metrics["train/tokens"] = float(sum(len(sample.tokens) for sample in data.train_samples))
        if metrics["train/skipped_steps"]:
            self.note("an optimizer step was skipped: the gradient's norm was not finite; the weights are untouched")
        declared.check(metrics)
        return metrics

    def _note_silence(self, advantages: list[float]) -> None:
        """Say when rewards teach nothing, and every tenth time that they go on like that."""
        self._silent_steps = 0 if any(advantages) else self._silent_steps + 1
        if self._silent_steps % 10 == 1:
            self.note(
                "every advantage of this step is 0, as the samples of each prompt got equal rewards: there is nothing "
                "to learn from"
            )

    def evaluation(self, rollout_id: int, output: RolloutFnEvalOutput) -> dict[str, float]:
        """Metrics of the held-out sets."""
        run = self.run
        if run.context is not None:
            self._note_failures(run.context.rewards.take_counts(evaluation=True))
        if self._eval_log is not None and self._eval_log(rollout_id, run.args, output.data, output.metrics):
            return {}
        metrics = dict(output.metrics) if output.metrics else declared.eval_metrics(output.data, run.args)
        for name, results in output.data.items():
            self._kept += [
                self._record(rollout_id, s, eval_set=name) for s in results.get("samples", [])[:KEPT_SAMPLES]
            ]
        return metrics | {"eval/step": float(rollout_id)}

    def _note_failures(self, counts: dict[str, int]) -> None:
        failed = ", ".join(f"{counts[outcome]} {outcome}" for outcome in FAILURES if counts[outcome])
        if failed:
            self.note(f"rewards failed in this evaluation and count as 0 there: {failed}")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Close a step."""
        taken = self.clock.take() | self.clock.memory.take()
        declared.check(taken)
        metrics = metrics | taken
        if "perf/actor_train_time" in metrics:
            metrics["perf/actor_train_tok_per_s"] = metrics["train/tokens"] / metrics["perf/actor_train_time"]
        with writing(self.run.run_dir):
            if step >= 0 and self._kept:
                write_samples(self.run.run_dir, step, self._kept)
                self._kept = []
            self.run.trackers.log(step, metrics)
        self.clock.progress.step(step, metrics)

    def keep_samples(self, rollout_id: int, data: TrainingData, policy: list[LogProbs]) -> None:
        """Remember some samples of a rollout for the report, with their log-probs; `log` writes them."""
        together = zip(data.samples, data.train_samples, policy, strict=True)
        self._kept += [
            self._record(rollout_id, sample, advantage=train_sample.advantage, policy=result)
            for sample, train_sample, result in islice(together, KEPT_SAMPLES)
        ]

    def recall(self) -> None:
        """Show the steps that a resumed run has behind it."""
        for row in read_steps(self.run.run_dir / FILE_NAME):
            self.clock.progress.recall(row)

    def note(self, text: str) -> None:
        self.clock.progress.message(text)

    def _record(
        self,
        rollout_id: int,
        sample: Sample,
        *,
        advantage: float | None = None,
        policy: LogProbs | None = None,
        eval_set: str | None = None,
    ) -> dict[str, Any]:
        tokenizer = self.run.tokenizer
        response = sample.tokens[sample.prompt_length :]
        key = self.run.config.reward.reward_key
        reward = sample.reward[key] if key and isinstance(sample.reward, dict) else sample.reward
        return {
            "step": rollout_id,
            "group_index": sample.group_index,
            "index": sample.index,
            "prompt": tokenizer.decode(sample.tokens[: sample.prompt_length]),
            "response": sample.response or tokenizer.decode(response),
            "label": sample.label,
            "reward": reward if isinstance(reward, int | float) else None,
            "advantage": advantage,
            "status": sample.status.value,
            "response_tokens": [self._token_text(token) for token in response],
            "rollout_log_probs": sample.rollout_log_probs or [],
            "policy_log_probs": [] if policy is None else policy.log_probs.tolist(),
            "loss_mask": sample.loss_mask if sample.loss_mask is not None else [1] * sample.response_length,
            "eval": eval_set,
        }
