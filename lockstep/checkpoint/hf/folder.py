"""What an HF folder says it holds, against what the model needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lockstep.checkpoint.hf.files import TensorInfo, WeightFiles
from lockstep.checkpoint.hf.fp8 import SCALE_SUFFIX, Blocks, read_quantization, require_readable, require_weight
from lockstep.checkpoint.hf.shards import Holding, Index
from lockstep.errors import ModelError
from lockstep.models import LanguageModel, build_model
from lockstep.models.hf_names import hf_tensors

OnBytes = Callable[[int, int], None]
"""Told, after each tensor, how many bytes are done and how many there are in all."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_OTHER_CONFIG = "Use the config.json that belongs to these weights."


def read_hf_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of an HF folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            "--hf-checkpoint",
            str(folder),
            "it holds no config.json." if folder.is_dir() else "the folder does not exist.",
            "Give the path of a downloaded HF model folder.",
        )
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(str(path), "unreadable JSON", f"{error}.", "Download the file again.") from error
    if not isinstance(config, dict):
        raise ModelError(str(path), type(config).__name__, "it is not a JSON object.", "Download the file again.")
    return config


@dataclass(frozen=True)
class Place:
    """Where a stored tensor stands in the model."""

    holding: Holding
    index: Index


@dataclass(frozen=True)
class Matched:
    """An HF folder whose every tensor has one place in the model, is carried along, or is the scales of another."""

    files: WeightFiles
    blocks: Blocks | None
    places: dict[str, Place]
    """HF name -> its place; of tied embeddings the head too where it is stored."""


def match(model: LanguageModel, folder: Path) -> Matched:
    """Compare the headers of a folder's files with the model. No tensor is read.

    Raises:
        ModelError: a tensor is missing, surplus, or of another shape or type, or of a quantisation that is not read.
        CheckpointError: a file is missing or damaged, or the index says something else than the files.
    """
    files, blocks = WeightFiles(folder), read_quantization(read_hf_config(folder))
    places = hf_places(model)
    if model.config.tie_word_embeddings and HEAD in files.tensors:
        places[HEAD] = places[EMBEDDING]
    for name, info in files.tensors.items():
        if name.endswith(SCALE_SUFFIX):
            require_weight(files, name)
            continue
        is_carried = name.startswith(model.carried_prefixes)
        if name not in places and not is_carried:
            raise ModelError(
                f"{folder} tensor {name}",
                list(info.shape),
                "the model that config.json describes has no such tensor.",
                _OTHER_CONFIG,
            )
        require_readable(files, name, blocks)
        if not is_carried:
            _require_shape(files, name, info, places[name])
    if missing := [name for name in places if name not in files.tensors]:
        raise ModelError(
            f"{folder} tensor {missing[0]}",
            "missing",
            f"{len(missing)} tensors that config.json asks for are not in the safetensors files.",
            "Download the missing files, or use the config.json that belongs to these weights.",
        )
    if blocks is not None and not any(name.endswith(SCALE_SUFFIX) for name in files.tensors):
        raise ModelError(
            "config.json quantization_config",
            "fp8",
            f"no weight in {folder} is quantised.",
            "Remove the field if the weights are right, or use the files that belong to this config.json.",
        )
    return Matched(files, blocks, places)


def hf_places(model: LanguageModel) -> dict[str, Place]:
    """HF names and their places, of the whole model also where this process has one stage of it."""
    here = dict(model.named_parameters())
    any_parameter = next(iter(here.values()))
    if model.config.tie_word_embeddings and EMBEDDING not in here and HEAD in here:
        here[EMBEDDING] = here[HEAD]  # a last stage has a copy of its own
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in build_model(model.config).named_parameters()}
    holdings = {
        name: Holding(here[name]) if name in here else Holding.of_nothing(shape, any_parameter)
        for name, shape in shapes.items()
    }
    return {
        tensor.name: Place(holding, tensor.index)
        for name, holding in holdings.items()
        for tensor in hf_tensors(name, holding.shape)
    }


def _require_shape(files: WeightFiles, name: str, info: TensorInfo, place: Place) -> None:
    wanted = place.holding.indexed_shape(place.index)
    if info.shape != wanted:
        raise ModelError(
            f"{files.folder} tensor {name}", list(info.shape), f"config.json asks for {list(wanted)}.", _OTHER_CONFIG
        )
