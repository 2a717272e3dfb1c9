"""HF folders in and out: config.json and safetensors, streamed tensor by tensor, of which a process reads its part."""

from __future__ import annotations

from lockstep.checkpoint.hf.dummy import fill_with_dummies
from lockstep.checkpoint.hf.export import require_replaceable, save_hf_model
from lockstep.checkpoint.hf.folder import OnBytes, read_hf_config
from lockstep.checkpoint.hf.load import FillWeights, load_hf_model, load_hf_weights

__all__ = [
    "FillWeights",
    "OnBytes",
    "fill_with_dummies",
    "load_hf_model",
    "load_hf_weights",
    "read_hf_config",
    "require_replaceable",
    "save_hf_model",
]
