"""The nouns that flow through the loop: `Sample` and what hooks return.

Field names and meanings are slime's. This module imports no torch: reward workers load it and must start fast.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any


@dataclass
class Sample:
    """One prompt with one response, from the data source to the loss."""

    class Status(Enum):
        PENDING = "pending"
        COMPLETED = "completed"
        TRUNCATED = "truncated"
        ABORTED = "aborted"
        FAILED = "failed"

    group_index: int | None = None
    """All samples of one prompt share it."""
    index: int | None = None
    """Unique over the run, in drawing order."""
    rollout_id: int | None = None
    """The averaging unit of the loss: siblings that share it share one denominator. Defaults to `index`."""
    prompt: str | list[dict[str, Any]] = ""
    tokens: list[int] = field(default_factory=list)
    """Prompt followed by response. The record; `response` is derived from it."""
    response: str = ""
    response_length: int = 0
    """Tokens of the response, the tail of `tokens`."""
    label: str | None = None
    reward: float | dict[str, Any] | None = None
    loss_mask: list[int] | None = None
    """One per response token, 1 where the policy wrote it. None means all ones."""
    weight_versions: list[str] = field(default_factory=list)
    """Policy version of each generated token."""
    rollout_log_probs: list[float] | None = None
    """Sampler's log-probs after temperature and nucleus, one per response token, 0.0 where the policy did not write."""
    rollout_top_p_token_ids: list[int] | None = None
    """Kept nucleus of every response token, concatenated; None when nothing was cut."""
    rollout_top_p_token_offsets: list[int] | None = None
    """[response_length + 1] borders in `rollout_top_p_token_ids`."""
    rollout_routed_experts: Any | None = None
    """Array [len(tokens) - 1, moe layers, top_k] of expert ids, None for dense models."""
    remove_sample: bool = False
    """Leave it out of the loss; it still counts in its group's mean and standard deviation."""
    teacher_log_probs: list[float] | None = None
    status: Status = Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)
    train_metadata: dict[str, Any] | None = None
    apply_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    generate_function_path: str | None = None
    custom_rm_path: str | None = None
    session_id: str | None = None
    non_generation_time: float = 0.0
    """Seconds spent in tools and waiting, inside generate."""

    @property
    def prompt_length(self) -> int:
        return len(self.tokens) - self.response_length

    @property
    def effective_response_length(self) -> int:
        """Response tokens that the loss sees."""
        return self.response_length if self.loss_mask is None else sum(self.loss_mask)

    def get_reward_value(self, args: Any) -> Any:
        """The scalar to train on: `reward` itself, or its entry `args.reward_key`."""
        return self.reward if not args.reward_key else self.reward[args.reward_key]  # type: ignore[index]

    def append_response_tokens(
        self,
        args: Any,
        *,
        tokens: list[int],
        log_probs: list[float] | None = None,
        trainable: bool = True,
        meta_info: dict[str, Any] | None = None,
        text: str = "",
        update_terminal_info: bool = True,
    ) -> None:
        """Append one turn: what the policy wrote (`trainable`) or what a tool answered."""
        if log_probs is not None and len(log_probs) != len(tokens):
            raise ValueError(f"{len(log_probs)} log-probs for {len(tokens)} tokens: give one per token, or None.")
        if self.loss_mask is None:
            self.loss_mask = [1] * self.response_length
        if self.rollout_log_probs is None and (log_probs is not None or not trainable):
            self.rollout_log_probs = [0.0] * self.response_length
        self.tokens = self.tokens + list(tokens)
        self.response += text
        self.response_length += len(tokens)
        self.loss_mask = self.loss_mask + [int(trainable)] * len(tokens)
        if self.rollout_log_probs is not None:
            self.rollout_log_probs = self.rollout_log_probs + list(log_probs or [0.0] * len(tokens))
        if meta_info and update_terminal_info:
            finish = meta_info.get("finish_reason", {}).get("type")
            status = {
                "length": Sample.Status.TRUNCATED,
                "stop": Sample.Status.COMPLETED,
                "abort": Sample.Status.ABORTED,
            }
            self.status = status.get(finish, self.status)

    def to_dict(self) -> dict[str, Any]:
        """A copy made of plain values; `from_dict` is its inverse."""
        result = {f.name: copy.deepcopy(getattr(self, f.name)) for f in fields(self)}
        result["status"] = self.status.value
        return result

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Sample:
        """Rebuild a sample; names that are not fields are an error."""
        values = dict(values)
        values["status"] = cls.Status(values.get("status", "pending"))
        return cls(**values)


Group = list[Sample]
"""All samples of one prompt."""


@dataclass(frozen=True)
class RolloutFnTrainOutput:
    """What a rollout function returns for training."""

    samples: list[Group]
    metrics: dict[str, Any] | None = None


@dataclass(frozen=True)
class RolloutFnEvalOutput:
    """What a rollout function returns for evaluation: per data set "rewards", "truncated", "samples"."""

    data: dict[str, dict[str, Any]]
    metrics: dict[str, Any] | None = None


@dataclass(frozen=True)
class DynamicFilterOutput:
    """Verdict of `--dynamic-sampling-filter-path` on one finished group."""

    keep: bool
    reason: str | None = None
    keep_when_insufficient: bool = False
