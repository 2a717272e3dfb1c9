"""Sampling: engines, generate functions and the collection of scored groups."""

from __future__ import annotations

from lockstep.rollout.policy import Policy, current_policy

__all__ = ["Policy", "current_policy"]
