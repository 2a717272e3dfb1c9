"""Safetensors files are written as safetensors writes them, and read in parts without reading the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lockstep.checkpoint.hf.files import INDEX, TensorInfo, WeightFiles, dtype_name, write_safetensors, written_order
from lockstep.checkpoint.hf.shards import whole
from lockstep.errors import CheckpointError

TENSORS = {
    "b": torch.arange(6).reshape(2, 3).bfloat16(),
    "a": torch.arange(12).reshape(3, 2, 2).half(),
    "z.ü": torch.arange(5).float(),
    "c": torch.arange(6).reshape(2, 3).T.float(),
    "d": torch.tensor(3.0),
    "odd": torch.ones(3).bfloat16(),
    "none": torch.ones(0, 4).half(),
}
"""Every type that is written, transposed, scalar, empty, of odd size, in no order."""


def written(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> bytes:
    infos = {name: TensorInfo(tuple(tensor.shape), dtype_name(tensor.dtype)) for name, tensor in tensors.items()}
    infos = written_order(infos)
    write_safetensors(path, infos, (tensors[name] for name in infos), metadata)
    return path.read_bytes()


@pytest.mark.parametrize("metadata", [{"format": "pt"}, None])
@pytest.mark.parametrize("names", [list(TENSORS), ["b"], ["b", "odd"], ["z.ü", "d"]])
def test_a_file_is_written_byte_for_byte_as_safetensors_does(
    tmp_path: Path, names: list[str], metadata: dict[str, str] | None
) -> None:
    tensors = {name: TENSORS[name] for name in names}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, str(tmp_path / "theirs"), metadata=metadata)
    assert written(tmp_path / "ours", tensors, metadata) == (tmp_path / "theirs").read_bytes()


def test_a_tensor_is_never_written_under_a_header_that_says_something_else(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="as the header says"):
        write_safetensors(tmp_path / "ours", {"a": TensorInfo((3,), "F32")}, [torch.ones(4)], None)


def test_a_region_is_read_and_counted_alone(tmp_path: Path) -> None:
    written(tmp_path / "model.safetensors", TENSORS, None)
    files = WeightFiles(tmp_path)
    assert files.bytes_read == 0
    assert torch.equal(files.read("a", (slice(1, 3), slice(0, 2), slice(1, 2))), TENSORS["a"][1:3, :, 1:2])
    assert files.bytes_read == 4 * 2
    for name, tensor in TENSORS.items():
        assert torch.equal(files.read(name, whole(tensor.shape)), tensor)
    assert files.bytes_read == 4 * 2 + sum(tensor.nbytes for tensor in TENSORS.values())


def test_a_file_that_vanishes_while_it_is_needed_is_an_error_of_ours(tmp_path: Path) -> None:
    written(tmp_path / "model.safetensors", TENSORS, None)
    files = WeightFiles(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        files.read("a")


def test_files_are_those_that_the_index_names(tmp_path: Path) -> None:
    for file, names in {"x.safetensors": ["a", "b"], "y.safetensors": ["c"]}.items():
        written(tmp_path / file, {name: TENSORS[name] for name in names}, {"file": file})
    weight_map = {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    files = WeightFiles(tmp_path)
    assert files.file_of == weight_map
    assert list(files.names_by_file()) == [["a", "b"], ["c"]]
    assert files.metadata == {file: {"file": file} for file in ("x.safetensors", "y.safetensors")}
