"""Model definitions: single-device code over packed rows, parameters named as in HF checkpoints."""

from __future__ import annotations

from lockstep.models.config import ModelConfig
from lockstep.models.families import FAMILIES, build_model, read_model_config
from lockstep.models.language_model import LanguageModel
from lockstep.models.qwen3 import Qwen3, Qwen3Config
from lockstep.models.qwen3_next import Qwen3Next, Qwen3NextConfig

__all__ = [
    "FAMILIES",
    "LanguageModel",
    "ModelConfig",
    "Qwen3",
    "Qwen3Config",
    "Qwen3Next",
    "Qwen3NextConfig",
    "build_model",
    "read_model_config",
]
