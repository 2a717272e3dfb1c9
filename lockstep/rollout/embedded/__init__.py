"""Our engine: four nouns (sequence, block manager, scheduler, runner) on the trainer's parameters."""

from __future__ import annotations

from lockstep.rollout.embedded.engine import EmbeddedEngine

__all__ = ["EmbeddedEngine"]
