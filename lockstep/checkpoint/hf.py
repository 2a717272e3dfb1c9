"""HF folders in and out: config.json and safetensors, read tensor by tensor, written shard by shard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lockstep.checkpoint.atomic import atomic_directory
from lockstep.errors import CheckpointError, ModelError, OptionError
from lockstep.models.qwen3 import Qwen3, Qwen3Config, hf_views

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_READABLE = (torch.float32, torch.bfloat16, torch.float16)


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
    except ValueError as error:
        raise ModelError(str(path), "unreadable JSON", f"{error}.", "Download the file again.") from error
    if not isinstance(config, dict):
        raise ModelError(str(path), type(config).__name__, "it is not a JSON object.", "Download the file again.")
    return config


def load_hf_model(folder: Path, *, dtype: torch.dtype, device: torch.device) -> Qwen3:
    """Build the model of an HF folder and fill every parameter from its safetensors.

    Raises:
        ModelError: a tensor is missing, surplus or of another shape, or the config is not computed here.
        CheckpointError: a file is missing or damaged.
    """
    config = Qwen3Config.from_hf(read_hf_config(folder))
    with torch.device("meta"):
        model = Qwen3(config)
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()
    targets = dict(named_hf_tensors(model))
    for name, tensor in _stored_tensors(folder):
        target = targets.pop(name, None)
        if target is None:
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            raise ModelError(
                f"{folder} tensor {name}",
                list(tensor.shape),
                "the model that config.json describes has no such tensor, or it was stored twice.",
                "Use the config.json that belongs to these weights.",
            )
        if tensor.dtype not in _READABLE:
            raise ModelError(
                f"{folder} tensor {name}",
                str(tensor.dtype),
                "quantised weights cannot be read yet.",
                "Use a checkpoint in float32, bfloat16 or float16.",
            )
        if target.shape != tensor.shape:
            raise ModelError(
                f"{folder} tensor {name}",
                list(tensor.shape),
                f"config.json asks for {list(target.shape)}.",
                "Use the config.json that belongs to these weights.",
            )
        with torch.no_grad():
            target.copy_(tensor)
    if targets:
        raise ModelError(
            f"{folder} tensor {next(iter(targets))}",
            "missing",
            f"{len(targets)} tensors that config.json asks for are not in the safetensors files.",
            "Download the missing files, or use the config.json that belongs to these weights.",
        )
    return model


def save_hf_model(model: Qwen3, folder: Path, *, source: Path) -> None:
    """Export the weights under their HF names, beside config and tokenizer files copied from `source`, atomically.

    Tensors go to the shards that hold them in `source`; config.json says the type that they are written in.
    """
    require_replaceable(folder, source=source)
    shard_of = _weight_map(source)
    with atomic_directory(folder, replace=True) as temporary:
        for path in source.iterdir():
            if path.is_file() and path.suffix not in (".safetensors", ".bin", ".jsonl") and path.name != _INDEX:
                shutil.copy2(path, temporary)
        _set_dtype(temporary / "config.json", model.lm_head.weight.dtype)
        by_shard: dict[str, dict[str, Tensor]] = {}
        for name, tensor in named_hf_tensors(model):
            by_shard.setdefault(shard_of.get(name, _SINGLE), {})[name] = tensor
        for shard, tensors in by_shard.items():
            on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(on_host, str(temporary / shard), metadata={"format": "pt"})
            (temporary / shard).chmod(temporary.stat().st_mode & 0o666)  # safetensors writes for the owner only
        if shard_of:
            (temporary / _INDEX).write_text(json.dumps(_index(by_shard), indent=2))


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


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    """Make a config.json say the type of its weights; untouched where it already does."""
    config = json.loads(path.read_text())
    key, name = "torch_dtype" if "torch_dtype" in config else "dtype", str(dtype).removeprefix("torch.")
    if config.get(key) != name:
        path.write_text(json.dumps(config | {key: name}, indent=2))


def _index(by_shard: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """The sharding index of HF folders."""
    tensors = [tensor for shard in by_shard.values() for tensor in shard.values()]
    return {
        "metadata": {
            "total_parameters": sum(tensor.numel() for tensor in tensors),
            "total_size": sum(tensor.nbytes for tensor in tensors),
        },
        "weight_map": {name: shard for shard, held in sorted(by_shard.items()) for name in sorted(held)},
    }


def named_hf_tensors(model: Qwen3) -> Iterator[tuple[str, Tensor]]:
    """Every HF tensor of the model as a view of our parameters; a tied lm_head is left out, as HF writes it."""
    for name, parameter in model.named_parameters():
        yield from hf_views(name, parameter.data)


def _stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    files = sorted(set(_weight_map(folder).values())) or [_SINGLE]
    for file in files:
        path = folder / file
        if not path.is_file():
            raise CheckpointError(str(path), "missing", "the folder holds no such weights file.", "Download it again.")
        try:
            with safe_open(str(path), framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(
                str(path), "damaged", f"safetensors says: {error}.", "Download or write the file again."
            ) from error


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name to file name, from the sharding index; empty when the weights are one file."""
    path = folder / _INDEX
    if not path.is_file():
        return {}
    try:
        weight_map: dict[str, str] = json.loads(path.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            str(path), "unreadable", "it is no JSON object with a weight_map.", "Download the file again."
        ) from error
    return weight_map
