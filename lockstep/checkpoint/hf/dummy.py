"""Random weights in place of a folder's: to see how fast a run is and what it takes before anything is downloaded."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lockstep.checkpoint.hf.folder import OnBytes, hf_places
from lockstep.models import LanguageModel

_STD = 0.02
_VECTORS = {"A_log": 0.0, "bias": 0.0, "dt_bias": 1.0}
"""What vectors begin with; of norms it is what leaves their input's scale alone."""


@torch.no_grad()
def fill_with_dummies(model: LanguageModel, folder: Path, *, on_bytes: OnBytes | None = None) -> int:
    """As `load_hf_weights`, but matrices are drawn from a normal distribution and nothing is read from `folder`.

    A tensor's numbers depend on its HF name alone, so that on one kind of device all layouts have the same model.
    """
    for module in model.modules():
        for name, vector in module.named_parameters(recurse=False):
            if vector.dim() == 1:
                local = vector.to_local() if isinstance(vector, DTensor) else vector
                local.fill_(_first_value(module, name))
    parts = {}
    for name, place in hf_places(model).items():
        shape, part = place.holding.indexed_shape(place.index), place.holding.shared(place.index)
        if part is not None and len(shape) > 1:
            parts[name] = shape, part
    done, total = 0, sum(part.view.nbytes for _, part in parts.values())
    for name, (shape, part) in parts.items():
        generator = torch.Generator(part.view.device).manual_seed(zlib.crc32(name.encode()))
        drawn = torch.randn(shape, generator=generator, device=part.view.device) * _STD
        part.view.copy_(drawn[part.region])
        done += part.view.nbytes
        if on_bytes is not None:
            on_bytes(done, total)
    return done


def _first_value(module: nn.Module, name: str) -> float:
    return _VECTORS.get(name, 1.0 - getattr(module, "weight_offset", 0.0))
