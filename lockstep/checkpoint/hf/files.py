"""The safetensors files of an HF folder: checked against their index, read in parts, written in a stream."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lockstep.checkpoint.hf.shards import Region, region_shape, whole
from lockstep.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types that weights are read and written in, by safetensors' names, in the order in which its own writer puts them."""
FP8 = "F8_E4M3"
_BYTES = {"F32": 4, "BF16": 2, "F16": 2, FP8: 1}
_HEADER_ALIGNMENT = 8
_DOWNLOAD = "Download or write the file again."


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor; `dtype` is safetensors' name of the type."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return _BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


class WeightFiles:
    """All safetensors files of a folder. Opening reads headers alone, and every file has to be as its index says.

    Raises:
        CheckpointError: a file is missing, damaged, unnamed, or holds other tensors than the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_index(folder)
        self.tensors: dict[str, TensorInfo] = {}
        self.file_of: dict[str, str] = {}
        self.metadata: dict[str, dict[str, str] | None] = {}
        self.bytes_read = 0
        """Bytes of tensors that were asked for."""
        self._open: dict[str, Any] = {}
        weight_map = None if self.index is None else self.index["weight_map"]
        self.files = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
        if weight_map is None:  # of shards without their index, the index is what is missing
            self._refuse_other_files()
        for file in self.files:
            self._read_header(file, weight_map)
        self._refuse_other_files()
        for name, file in (weight_map or {}).items():
            if name not in self.file_of:
                raise CheckpointError(
                    f"{folder / INDEX} {name}", file, "that file holds no such tensor.", "Download the folder again."
                )

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """A tensor, or a region of it, straight from the file's pages: do not write to it.

        Raises:
            CheckpointError: the file cannot be read.
        """
        file, info = self.file_of[name], self.tensors[name]
        region = whole(info.shape) if region is None else region
        with _reading(self.folder / file):
            tensor: Tensor = (
                self._handle(file).get_slice(name)[region] if region else self._handle(file).get_tensor(name)
            )
        self.bytes_read += TensorInfo(region_shape(region), info.dtype).nbytes
        return tensor

    def names_by_file(self) -> Iterator[list[str]]:
        """The names in each file; the pages of a file that was read are given back before the next one."""
        for file in self.files:
            yield [name for name, holder in self.file_of.items() if holder == file]
            self.close()

    def close(self) -> None:
        """Give the pages of the files read so far back; reading opens them again."""
        self._open.clear()

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(str(self.folder / file), framework="pt")
        return self._open[file]

    def _refuse_other_files(self) -> None:
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self.files:
                says = f"{INDEX} does not name it" if self.index is not None else f"there is no {INDEX} that names it"
                raise CheckpointError(
                    str(path),
                    "not expected",
                    f"{says}, so its tensors would be left out.",
                    f"Download a missing {INDEX}, or move files that are no part of the model elsewhere.",
                )

    def _read_header(self, file: str, weight_map: Mapping[str, str] | None) -> None:
        path = self.folder / file
        if not path.is_file():
            raise CheckpointError(str(path), "missing", "the folder holds no such weights file.", "Download it again.")
        with _reading(path), safe_open(str(path), framework="pt") as header:
            self.metadata[file] = header.metadata()
            for name in header.keys():  # noqa: SIM118 (safe_open is no mapping)
                if weight_map is not None and weight_map.get(name) != file:
                    says = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                    raise CheckpointError(
                        f"{path} tensor {name}", None, f"by {INDEX} it is {says}.", "Download the folder again."
                    )
                entry = header.get_slice(name)
                self.tensors[name] = TensorInfo(tuple(entry.get_shape()), entry.get_dtype())
                self.file_of[name] = file


def write_safetensors(
    path: Path, infos: Mapping[str, TensorInfo], tensors: Iterable[Tensor], metadata: Mapping[str, str] | None
) -> None:
    """Write a file, byte for byte as safetensors itself does, holding one tensor at a time.

    Args:
        infos: in the order of `written_order`.
        tensors: in the same order, of any device and layout.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, info in infos.items():
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for info, tensor in zip(infos.values(), tensors, strict=True):
            assert (tuple(tensor.shape), tensor.dtype) == (info.shape, FLOATS[info.dtype]), "as the header says"
            file.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def written_order(infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """As safetensors orders the tensors of a file: by type, then by name."""
    types = list(FLOATS)
    return dict(sorted(infos.items(), key=lambda item: (types.index(item[1].dtype), item[0])))


def dtype_name(dtype: torch.dtype) -> str:
    """Safetensors' name of a type that weights are written in."""
    return next(name for name, known in FLOATS.items() if known == dtype)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, OverflowError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(str(path), "damaged", f"reading it failed: {reason}.", _DOWNLOAD) from error


def read_index(folder: Path) -> dict[str, Any] | None:
    """The sharding index with a weight_map of file names; None when the weights are one file."""
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        parsed = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(str(path), "unreadable", f"{error}.", _DOWNLOAD) from error
    index: dict[str, Any] = parsed if isinstance(parsed, dict) else {}
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(str(path), "unreadable", "it is no JSON object with a weight_map.", _DOWNLOAD)
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} {name}", file, "that is no name of a safetensors file in the folder.", _DOWNLOAD
            )
    return index
