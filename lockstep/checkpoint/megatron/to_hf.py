"""Megatron-Core's distributed checkpoint -> HF folder: one unit of the mapping in memory at a time."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from collections.abc import Mapping as Dict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockstep.checkpoint.hf.export import copy_rest, reporter
from lockstep.checkpoint.hf.files import (
    FLOATS,
    INDEX,
    SINGLE,
    TensorInfo,
    WeightFiles,
    dtype_name,
    read_index,
    write_safetensors,
    written_order,
)
from lockstep.checkpoint.hf.folder import OnBytes, read_hf_config
from lockstep.checkpoint.hf.fp8 import SCALE_SUFFIX
from lockstep.checkpoint.megatron.ahead import one_ahead
from lockstep.checkpoint.megatron.layouts import Vocabulary
from lockstep.checkpoint.megatron.mapping import ALSO_READ, MTP_PREFIX, TIED_HEAD, Mapping, Place, Unit
from lockstep.checkpoint.megatron.ranks import ALONE, Ranks
from lockstep.checkpoint.megatron.torch_dist import TorchDistReader, checkpoint_folder, require_absent
from lockstep.errors import ModelError
from lockstep.models import read_model_config

FILE_BYTES = 5 * 10**9
"""Size of safetensors files where the HF folder does not say how tensors are spread."""
_NO_WEIGHT = re.compile(r"(chained_\d+\.)?optimizer\.")
"""Beginning of the names of tensors in a training checkpoint that are no weights."""
_OTHER_MODEL = "Give the --hf-checkpoint that the run began with."


def torch_dist_to_hf(
    source: Path,
    hf_checkpoint: Path,
    target: Path,
    *,
    ranks: Ranks = ALONE,
    on_bytes: OnBytes | None = None,
) -> list[str]:
    """Write the weights of a Megatron checkpoint under HF's names, atomically.

    Everything that headers can tell is checked before the first tensor is read. Each process writes some of the files.

    Args:
        source: the folder of a run, of which the latest checkpoint is taken, or of one checkpoint.
        hf_checkpoint: gives config.json, tokenizer and the files that the tensors go to; its weights are not read.
    Returns:
        What the user should know of the result.
    Raises:
        OptionError: `target` exists.
        ModelError: the checkpoint is not of the model that config.json describes.
        CheckpointError: a file is missing or damaged, or cannot be written; then nothing is left behind.
    """
    require_absent("--save-hf", target)
    config, file_of = read_model_config(read_hf_config(hf_checkpoint)), _files_of(hf_checkpoint)
    reader = TorchDistReader(checkpoint_folder(source))
    has_mtp = any(name.startswith(MTP_PREFIX) for name in reader.tensors)
    has_tied_head = config.tie_word_embeddings and TIED_HEAD in file_of
    stored = _Stored(reader, Mapping(config, has_mtp=has_mtp, has_tied_head=has_tied_head))
    plan = _plan(hf_checkpoint, file_of, stored.hf_infos())
    with ranks.atomic_directory(target) as temporary:
        ranks.first(lambda: copy_rest(hf_checkpoint, temporary, stored.main_dtype))
        ranks.together(lambda: _write_part(temporary, plan, stored, ranks, on_bytes))
        if plan.keys() != {SINGLE}:
            ranks.first(lambda: _write_index(temporary, hf_checkpoint, plan))
    if not has_mtp and any(name.startswith(MTP_PREFIX) for name in file_of):
        return [f"{source} holds no MTP layer, so the export has none; {hf_checkpoint} has one."]
    return []


class _Stored:
    """A checkpoint of Megatron in which every weight has one place in the mapping.

    Raises:
        ModelError: a tensor is missing, surplus, or of another shape or type.
    """

    def __init__(self, reader: TorchDistReader, mapping: Mapping) -> None:
        self.reader, self.mapping = reader, mapping
        self.unit_of = {name: unit for unit in mapping.units for name in unit.hf}
        self._found = {place: self._find(unit, place) for unit in mapping.units for place in unit.places}
        self.main_dtype = self._dtype(mapping.units[0])
        claimed = {name for found in self._found.values() for name, _ in found}
        for name in reader.tensors:
            if name not in claimed and not _NO_WEIGHT.match(name):
                raise ModelError(
                    f"{reader.folder} tensor {name}",
                    list(reader.shape(name)),
                    "the model that config.json describes has no such tensor.",
                    _OTHER_MODEL,
                )

    def hf_infos(self) -> dict[str, TensorInfo]:
        """Every HF tensor with the type that Megatron stored it in."""
        infos: dict[str, TensorInfo] = {}
        for unit in self.mapping.units:
            dtype = dtype_name(self._dtype(unit) if unit.layout.keeps_dtype else self.main_dtype)
            infos |= {name: TensorInfo(shape, dtype) for name, shape in unit.hf.items()}
        return infos

    def hf_tensors(self, unit: Unit) -> dict[str, Tensor]:
        """The HF tensors of a unit."""
        tensors = []
        for place in unit.places:
            parts = [self.reader.read(name, index) for name, index in self._found[place]]
            tensors.append(parts[0] if len(parts) == 1 else torch.cat(parts))
        return dict(zip(unit.hf, unit.layout.to_hf(tensors), strict=True))

    def _dtype(self, unit: Unit) -> torch.dtype:
        name, _ = self._found[unit.places[0]][0]
        dtype = self.reader.dtype(name)
        if dtype not in FLOATS.values() and unit.layout.keeps_dtype:
            raise ModelError(
                f"{self.reader.folder} tensor {name}", str(dtype), "weights of this type are not read.", "Use bfloat16."
            )
        return dtype

    def _find(self, unit: Unit, place: Place) -> list[tuple[str, tuple[int, ...]]]:
        """The tensor that holds a place, or the two whose rows do: (name, index of the leading axes)."""
        for names, lead in _candidates(place):
            if not all(name in self.reader.tensors for name in names):
                continue
            wanted = (*(size for _, size in lead), place.shape[0] // len(names), *place.shape[1:])
            for name in names:
                self._require_shape(name, wanted, unit)
            return [(name, tuple(index for index, _ in lead)) for name in names]
        raise ModelError(
            f"{self.reader.folder} tensor {place.key(stacks_layers=self.mapping.stacks_layers)}",
            "missing",
            f"it is needed for {' and '.join(unit.hf)}.",
            _OTHER_MODEL,
        )

    def _require_shape(self, name: str, wanted: tuple[int, ...], unit: Unit) -> None:
        shape = self.reader.shape(name)
        if isinstance(unit.layout, Vocabulary) and shape[0] >= unit.layout.vocab_size:
            wanted = (shape[0], *wanted[1:])  # however many rows of padding
        if shape != wanted:
            raise ModelError(
                f"{self.reader.folder} tensor {name}",
                list(shape),
                f"config.json asks for {list(wanted)}.",
                _OTHER_MODEL,
            )


def _candidates(place: Place) -> Iterator[tuple[tuple[str, ...], tuple[tuple[int, int], ...]]]:
    """How Megatron may have stored a place: (names of tensors whose rows are put together, leading axes).

    Layers are stacked or not. With `singleton_local_shards` experts are not, and the halves of linear_fc1 stand apart.
    """
    for name in dict.fromkeys((place.name, ALSO_READ.get(place.name, place.name))):
        for stacks_layers in (True, False):
            yield (place.key(stacks_layers=stacks_layers, name=name),), place.lead(stacks_layers=stacks_layers)
        key = place.key(stacks_layers=False, name=name)
        if place.expert:
            key = key.replace(".experts.experts.", f".experts.experts.{place.expert[0]}.")
        yield (key,), ()
        yield (key + "_w", key + "_v"), ()


def _files_of(hf_checkpoint: Path) -> dict[str, str]:
    """The file of each tensor by the HF folder's index, or its one file; empty where it has neither."""
    if (index := read_index(hf_checkpoint)) is not None:
        weight_map: dict[str, str] = index["weight_map"]
        return {name: file for name, file in weight_map.items() if not name.endswith(SCALE_SUFFIX)}
    return WeightFiles(hf_checkpoint).file_of if (hf_checkpoint / SINGLE).is_file() else {}


def _plan(
    hf_checkpoint: Path, file_of: Dict[str, str], infos: Dict[str, TensorInfo]
) -> dict[str, dict[str, TensorInfo]]:
    """Which tensors go to which file, in their order."""
    for name in file_of:
        if name not in infos and not name.startswith(MTP_PREFIX):
            raise ModelError(
                f"{hf_checkpoint} tensor {name}",
                "surplus",
                "the model that config.json describes has no such tensor.",
                "Use the config.json that belongs to these weights.",
            )
    for name in infos:
        if file_of and name not in file_of:
            raise ModelError(
                f"{hf_checkpoint / INDEX} {name}",
                "missing",
                "the checkpoint holds this tensor, and the index does not say which file it goes to.",
                f"Give an HF folder without {INDEX} and weights, and the files are made anew.",
            )
    plan: dict[str, dict[str, TensorInfo]] = {}
    for name, file in (file_of or _spread(infos)).items():
        if name in infos:
            plan.setdefault(file, {})[name] = infos[name]
    return {file: written_order(plan[file]) for file in sorted(plan)}


def _spread(infos: Dict[str, TensorInfo]) -> dict[str, str]:
    """A file for each tensor, of `FILE_BYTES` at most unless one tensor is larger."""
    number_of: dict[str, int] = {}
    number, size = 1, 0
    for name, info in infos.items():
        if size and size + info.nbytes > FILE_BYTES:
            number, size = number + 1, 0
        number_of[name], size = number, size + info.nbytes
    if number == 1:
        return dict.fromkeys(infos, SINGLE)
    return {name: f"model-{index:05d}-of-{number:05d}.safetensors" for name, index in number_of.items()}


def _write_part(
    folder: Path, plan: Dict[str, Dict[str, TensorInfo]], stored: _Stored, ranks: Ranks, on_bytes: OnBytes | None
) -> None:
    """Write this process's files."""

    def nbytes(file: str) -> int:
        return sum(info.nbytes for info in plan[file].values())

    files = ranks.share(list(plan), nbytes)
    report = reporter(on_bytes, sum(map(nbytes, files)))
    for file in files:
        tensors = one_ahead(_converted(stored, plan[file]))
        write_safetensors(folder / file, plan[file], report(tensors), {"format": "pt"})


def _converted(stored: _Stored, infos: Dict[str, TensorInfo]) -> Iterator[Tensor]:
    """The tensors of a file in their order; of a unit that is read, the others wait for their turn."""
    waiting: dict[str, Tensor] = {}
    for name, info in infos.items():
        if name not in waiting:
            parts = stored.hf_tensors(stored.unit_of[name])
            waiting |= {part: tensor for part, tensor in parts.items() if part in infos}
        yield waiting.pop(name).to(FLOATS[info.dtype])


def _write_index(folder: Path, hf_checkpoint: Path, plan: Dict[str, Dict[str, TensorInfo]]) -> None:
    """The HF folder's own index, byte for byte, unless other tensors or types are written."""
    before = read_index(hf_checkpoint)
    infos = {name: (file, info) for file, held in plan.items() for name, info in held.items()}
    names = list(infos) if before is None else [name for name in before["weight_map"] if name in infos]
    index: dict[str, Any] = {"metadata": {"total_size": 0}} if before is None else dict(before)
    index["weight_map"] = {name: infos[name][0] for name in names}
    sums = {
        "total_size": sum(info.nbytes for _, info in infos.values()),
        "total_parameters": sum(info.numel for _, info in infos.values()),
    }
    if isinstance(metadata := index.get("metadata"), dict):
        index["metadata"] = {key: sums.get(key, value) for key, value in metadata.items()}
    if index == before:
        shutil.copyfile(hf_checkpoint / INDEX, folder / INDEX)
    else:
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
