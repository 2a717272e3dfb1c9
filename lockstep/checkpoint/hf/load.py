"""From an HF folder to a model's parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from lockstep.checkpoint.hf.folder import EMBEDDING, HEAD, Matched, OnBytes, match, read_hf_config
from lockstep.checkpoint.hf.fp8 import read_into
from lockstep.checkpoint.hf.shards import Shared
from lockstep.errors import ModelError
from lockstep.models import LanguageModel, build_model, read_model_config


class FillWeights(Protocol):
    """Fills the parameters of a model that has its memory, of DTensors the part that this process holds; returns bytes.

    `load_hf_weights` and `fill_with_dummies` do.
    """

    def __call__(self, model: LanguageModel, folder: Path, *, on_bytes: OnBytes | None = None) -> int: ...


def load_hf_weights(model: LanguageModel, folder: Path, *, on_bytes: OnBytes | None = None) -> int:
    """Fill the parameters of a model that has its memory; of DTensors the part that this process holds.

    All that headers can tell is checked before the first tensor is read. Host memory grows by the pages of one file at
    most, which are given back before the next one.

    Returns:
        Bytes of tensors that this process has read.
    Raises:
        ModelError, CheckpointError: as `load_hf_model`; the parameters may then be filled in part.
    """
    matched = match(model, folder)
    files = matched.files
    parts = {name: part for name, place in matched.places.items() if (part := place.holding.shared(place.index))}
    second_head = parts.pop(HEAD, None) if model.config.tie_word_embeddings else None
    sizes = {name: part.view.numel() * files.tensors[name].itemsize for name, part in parts.items()}
    done, total = 0, sum(sizes.values())
    with torch.no_grad():
        for names in files.names_by_file():
            for name in (name for name in names if name in parts):
                part = parts[name]
                read_into(part.view, files, name, part.region, matched.blocks)
                done += sizes[name]
                if on_bytes is not None:
                    on_bytes(done, total)
        if second_head is not None:
            _require_tied(matched, second_head)
    files.close()
    return files.bytes_read


def load_hf_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    on_bytes: OnBytes | None = None,
    fill: FillWeights = load_hf_weights,
) -> LanguageModel:
    """Build the model of an HF folder and fill every parameter, by default from its safetensors.

    Raises:
        ModelError: the config is not computed here, or a tensor is missing, surplus, or of another shape or type.
        CheckpointError: a file is missing or damaged, or the index says something else than the files.
    """
    config = read_model_config(read_hf_config(folder))
    with torch.device("meta"):
        model = build_model(config)
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()
    fill(model, folder, on_bytes=on_bytes)
    return model


def _require_tied(matched: Matched, embedding: Shared) -> None:
    """A stored head beside tied embeddings has to be the embedding: else config.json and weights mean two models."""
    head = torch.empty_like(embedding.view)
    read_into(head, matched.files, HEAD, embedding.region, matched.blocks)
    if not torch.equal(head, embedding.view):
        raise ModelError(
            f"{matched.files.folder} tensor {HEAD}",
            list(matched.files.tensors[HEAD].shape),
            f"it differs from {EMBEDDING}, but config.json says tie_word_embeddings.",
            "Set tie_word_embeddings to false if the head was trained, or remove the tensor.",
        )
