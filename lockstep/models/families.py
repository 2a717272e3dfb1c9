"""Which definition computes which HF model type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lockstep.errors import ModelError
from lockstep.models.config import ModelConfig
from lockstep.models.language_model import LanguageModel
from lockstep.models.qwen3 import Qwen3
from lockstep.models.qwen3_next import Qwen3Next

FAMILIES: dict[str, type[LanguageModel]] = {"qwen3": Qwen3, "qwen3_moe": Qwen3, "qwen3_next": Qwen3Next}
"""HF model type -> its definition."""


def read_model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The shape that a parsed config.json describes.

    Raises:
        ModelError: another model type, or a field that its definition refuses.
    """
    family = FAMILIES.get(str(hf.get("model_type")))
    if family is None:
        raise ModelError(
            "config.json model_type",
            hf.get("model_type"),
            f"the families computed here are {', '.join(FAMILIES)}.",
            "Give --hf-checkpoint a folder of one of them.",
        )
    return family.config_class.from_hf(hf)


def build_model(config: ModelConfig) -> LanguageModel:
    """The model of that shape, on torch's current default device (build on `meta` to fill it from files)."""
    family = next(family for family in FAMILIES.values() if family.config_class is type(config))
    return family(config)
