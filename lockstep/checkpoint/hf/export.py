"""From a model's parameters to an HF folder."""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.checkpoint.atomic import atomic_directory
from lockstep.checkpoint.hf.files import (
    FLOATS,
    INDEX,
    TensorInfo,
    WeightFiles,
    dtype_name,
    write_safetensors,
    written_order,
)
from lockstep.checkpoint.hf.folder import Matched, OnBytes, match, read_hf_config
from lockstep.checkpoint.hf.fp8 import SCALE_SUFFIX, read_into
from lockstep.checkpoint.hf.shards import whole
from lockstep.errors import LockstepError, OptionError
from lockstep.models import LanguageModel

_NOT_COPIED = (".safetensors", ".bin", ".jsonl")
Plan = Mapping[str, Mapping[str, TensorInfo]]
"""File -> the tensors that go into it, in their order."""


def save_hf_model(model: LanguageModel, folder: Path, *, source: Path, on_bytes: OnBytes | None = None) -> None:
    """Export the weights under their HF names, beside config and tokenizer files copied from `source`, atomically.

    The folder gets the tensors of `source`, in the same files under the same index. Tensors that the model does not
    compute with are copied. All are written in the model's type, which config.json then says; FP8 is not written.
    A model of DTensors, or of pipeline stages, is exported by all processes together: rank 0 writes, and gets one
    tensor at a time.

    Raises:
        OptionError: `folder` is `source`, or no earlier export.
        ModelError: `source` is another model's folder.
        CheckpointError: it cannot be written, or `source` cannot be read; an earlier export is untouched.
    """
    require_replaceable(folder, source=source)
    matched = match(model, source)
    dtype = next(model.parameters()).dtype
    plan = _plan(matched, dtype)
    if not any(place.holding.is_sharded for place in matched.places.values()):
        _write(folder, matched, plan, dtype, _gathered(matched, plan), on_bytes)
        return
    gathered, failure = _gathered(matched, plan), None
    if dist.get_rank() == 0:
        try:
            _write(folder, matched, plan, dtype, gathered, on_bytes)
        except LockstepError as error:
            failure = error
    deque(gathered, maxlen=0)  # the others take part in gathering; so does rank 0 after a failure
    outcome = [failure]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise outcome[0]


def require_replaceable(folder: Path, *, source: Path) -> None:
    """An export replaces an earlier export, and nothing else.

    Raises:
        OptionError: `folder` is the model that the run began with, or holds something of the user's.
    """
    problem = None
    if folder.resolve() == source.resolve():
        problem = "it is --hf-checkpoint, which an export would overwrite."
    elif folder.exists() and not (folder / "config.json").is_file() and (folder.is_file() or any(folder.iterdir())):
        problem = "it exists and holds no config.json, so it is no earlier export that may be replaced."
    if problem:
        raise OptionError("--save-hf", str(folder), problem, "Give another folder.")


def _plan(matched: Matched, dtype: torch.dtype) -> Plan:
    """What is written to which file: what the source has, without scales."""
    plan: dict[str, dict[str, TensorInfo]] = {}
    for name, file in matched.files.file_of.items():
        if name.endswith(SCALE_SUFFIX):
            continue
        info = matched.files.tensors[name]
        if name in matched.places:
            info = TensorInfo(info.shape, dtype_name(matched.places[name].holding.dtype))
        elif info.dtype not in FLOATS:
            info = TensorInfo(info.shape, dtype_name(dtype))
        plan.setdefault(file, {})[name] = info
    return {file: written_order(infos) for file, infos in plan.items()}


def _gathered(matched: Matched, plan: Plan) -> Iterator[Tensor]:
    """The model's tensors in the order of the plan, which is the same on all processes."""
    for infos in plan.values():
        for name in infos:
            if (place := matched.places.get(name)) is not None:
                yield place.holding.gathered(place.index)


def _write(
    folder: Path,
    matched: Matched,
    plan: Plan,
    dtype: torch.dtype,
    gathered: Iterator[Tensor],
    on_bytes: OnBytes | None,
) -> None:
    files = matched.files
    report = reporter(on_bytes, sum(info.nbytes for infos in plan.values() for info in infos.values()))
    with atomic_directory(folder, replace=True) as temporary:
        copy_rest(files.folder, temporary, dtype)
        for file, infos in plan.items():
            tensors = (
                next(gathered) if name in matched.places else _carried(matched, name, info)
                for name, info in infos.items()
            )
            write_safetensors(temporary / file, infos, report(tensors), files.metadata[file])
            files.close()
        if files.index is not None:
            _write_index(temporary / INDEX, files, plan)


def _carried(matched: Matched, name: str, info: TensorInfo) -> Tensor:
    """A tensor of the source that the model does not compute with, in the type that it is written in."""
    tensor = torch.empty(info.shape, dtype=FLOATS[info.dtype])
    read_into(tensor, matched.files, name, whole(info.shape), matched.blocks)
    return tensor


def reporter(on_bytes: OnBytes | None, total: int) -> Callable[[Iterable[Tensor]], Iterator[Tensor]]:
    """What tensors pass through on their way to disk, file by file, so that `on_bytes` hears of them."""
    done = 0

    def report(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        nonlocal done
        for tensor in tensors:
            yield tensor
            done += tensor.nbytes
            if on_bytes is not None:
                on_bytes(done, total)

    return report


def copy_rest(source_folder: Path, folder: Path, dtype: torch.dtype) -> None:
    """Copy what is no weight; config.json then says the type of the weights, which are not quantised."""
    for path in source_folder.iterdir():
        if path.is_file() and path.suffix not in _NOT_COPIED and path.name != INDEX:
            shutil.copy2(path, folder)
    source = read_hf_config(source_folder)
    config = {key: value for key, value in source.items() if key != "quantization_config"}
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    if config != source:
        (folder / "config.json").write_text(json.dumps(config, indent=2))


def _write_index(path: Path, files: WeightFiles, plan: Plan) -> None:
    """The source's index, changed where other tensors or types are written; byte for byte the same where not."""
    assert files.index is not None, "sharded sources have one"
    written = {name: (file, info) for file, infos in plan.items() for name, info in infos.items()}
    index = files.index | {
        "weight_map": {name: written[name][0] for name in files.index["weight_map"] if name in written}
    }
    sums = {
        "total_size": sum(info.nbytes for _, info in written.values()),
        "total_parameters": sum(info.numel for _, info in written.values()),
    }
    if isinstance(metadata := index.get("metadata"), dict):
        index["metadata"] = {key: sums.get(key, value) for key, value in metadata.items()}
    if index == files.index:
        shutil.copyfile(files.folder / INDEX, path)
    else:
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
