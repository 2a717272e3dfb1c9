"""Rewards: what a response is worth, computed in worker processes that can be killed. Nothing here imports torch."""

from __future__ import annotations

from lockstep.rewards.outcome import FAILURES, Outcome, RewardOutcome
from lockstep.rewards.pool import RewardPool
from lockstep.rewards.registry import BUILTIN_REWARDS, check_reward_options

__all__ = ["BUILTIN_REWARDS", "FAILURES", "Outcome", "RewardOutcome", "RewardPool", "check_reward_options"]
