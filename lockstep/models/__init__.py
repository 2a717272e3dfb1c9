"""Model definitions: single-device code over packed rows, parameters named as in HF checkpoints."""

from __future__ import annotations

from lockstep.models.qwen3 import Qwen3, Qwen3Config

__all__ = ["Qwen3", "Qwen3Config"]
