"""Megatron-Core's distributed checkpoints on disk ("torch_dist"), read and written without Megatron.

A folder holds `metadata.json` (the format), `common.pt` (what is not sharded), `.metadata` (torch's index of all
tensors, pickled) and `__*.distcp`: files of chunks, each of them written by `torch.save`.
"""

from __future__ import annotations

import itertools
import json
import pickle
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from lockstep.errors import CheckpointError, OptionError

INDEX = ".metadata"
FORMAT = "metadata.json"
COMMON = "common.pt"
TRACKER = "latest_checkpointed_iteration.txt"
"""File in the folder of a run that says which of its checkpoints is the latest."""
RELEASE = "release"
"""The tracker's word for a checkpoint that no training made, and its folder."""
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_WRITE_BUFFER = 2**20
_COPY_AGAIN = "Copy or write the checkpoint again."


def checkpoint_folder(source: Path) -> Path:
    """The folder of one checkpoint: `source` itself, or the latest of the run that it is.

    Raises:
        CheckpointError: the run does not say which one is the latest.
    """
    if (source / FORMAT).is_file() or not (source / TRACKER).is_file():
        return source
    said = (source / TRACKER).read_text().strip()
    if said != RELEASE and not said.isdigit():
        raise CheckpointError(
            str(source / TRACKER), said, "it is neither a number nor release.", "Give the folder of one checkpoint."
        )
    return source / (said if said == RELEASE else f"iter_{int(said):07d}")


def require_absent(flag: str, target: Path) -> None:
    """Nothing is overwritten.

    Raises:
        OptionError: `target` is there and not empty.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OptionError(flag, str(target), "it exists.", "Give a new folder, or remove this one first.")


@dataclass(frozen=True)
class _Chunk:
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    stored: Any


class TorchDistReader:
    """Tensors of a folder by name. Opening reads the index alone, and checks that no file is missing or cut.

    Raises:
        CheckpointError: this is no such folder, or a file of it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _require_format(folder)
        metadata = read_index(folder)
        self.tensors: dict[str, TensorStorageMetadata] = {
            name: stored
            for name, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }
        self._stored = {
            (index.fqn, tuple(index.offset)): info
            for index, info in metadata.storage_data.items()
            if index.offset is not None
        }
        self._chunks: dict[tuple[str, int], dict[tuple[int, ...], list[_Chunk]]] = {}
        self._require_files(metadata)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = self.tensors[name].properties.dtype
        return dtype

    def read(self, name: str, lead: tuple[int, ...] = ()) -> Tensor:
        """`tensor[lead]`, put together from the chunks that hold parts of it.

        Raises:
            CheckpointError: a chunk is damaged, or some part of the tensor was never stored.
        """
        shape = self.shape(name)[len(lead) :]
        parts = []
        for chunk in self._chunks_at(name, lead):
            picked = tuple(index - start for index, start in zip(lead, chunk.offsets, strict=False))
            parts.append((chunk.offsets[len(lead) :], self._load(name, chunk)[picked]))
        if len(parts) == 1 and tuple(parts[0][1].shape) == shape:
            return parts[0][1]
        whole = torch.empty(shape, dtype=self.dtype(name))
        for offsets, part in parts:
            whole[tuple(slice(start, start + size) for start, size in zip(offsets, part.shape, strict=True))] = part
        if sum(part.numel() for _, part in parts) != whole.numel():
            raise CheckpointError(
                f"{self.folder} tensor {name}", list(lead), "parts of it were never stored.", _COPY_AGAIN
            )
        return whole

    def _chunks_at(self, name: str, lead: tuple[int, ...]) -> list[_Chunk]:
        """The chunks with some of `tensor[lead]`."""
        key = (name, len(lead))
        if key not in self._chunks:
            by_lead = defaultdict(list)
            for chunk in self.tensors[name].chunks:
                offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
                stored = _Chunk(offsets, sizes, self._stored[name, offsets])
                ranges = [range(start, start + size) for start, size in zip(offsets, sizes, strict=True)]
                for place in itertools.product(*ranges[: len(lead)]):
                    by_lead[place].append(stored)
            self._chunks[key] = by_lead
        return self._chunks[key][lead]

    def _load(self, name: str, chunk: _Chunk) -> Tensor:
        path = self.folder / chunk.stored.relative_path
        with _reading(path), path.open("rb") as file:
            part = cast(IO[bytes], _create_file_view(file, chunk.stored.offset, chunk.stored.length))
            tensor: Tensor = torch.load(part, map_location="cpu", weights_only=True)
        if tuple(tensor.shape) != chunk.sizes or tensor.dtype != self.dtype(name):
            raise CheckpointError(
                f"{path} tensor {name}",
                f"{list(tensor.shape)} {tensor.dtype}",
                f"{INDEX} says {list(chunk.sizes)} {self.dtype(name)}.",
                _COPY_AGAIN,
            )
        return tensor

    def _require_files(self, metadata: Metadata) -> None:
        ends: dict[str, int] = defaultdict(int)
        for info in metadata.storage_data.values():
            ends[info.relative_path] = max(ends[info.relative_path], info.offset + info.length)
        for file, end in sorted(ends.items()):
            path = self.folder / file
            if not path.is_file():
                raise CheckpointError(str(path), "missing", f"{INDEX} says that it holds tensors.", _COPY_AGAIN)
            if path.stat().st_size < end:
                raise CheckpointError(
                    str(path), "truncated", f"it has {path.stat().st_size} bytes, of {end} or more.", _COPY_AGAIN
                )


@dataclass
class Written:
    """What one process wrote: its part of the index."""

    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    chunks: list[tuple[str, tuple[int, ...], tuple[int, ...], Any]] = field(default_factory=list)
    objects: dict[str, Any] = field(default_factory=dict)


class TorchDistWriter:
    """Appends chunks to one file of `folder`, which exists; every process has a file of its own."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.written = Written()
        self._name = f"__{rank}_0.distcp"
        self._file: IO[bytes] = (folder / self._name).open("wb", buffering=_WRITE_BUFFER)

    def __enter__(self) -> TorchDistWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add_tensor(self, name: str, tensor: Tensor, lead: Sequence[tuple[int, int]] = ()) -> None:
        """Store `tensor` as that part of a tensor with more axes before its own: (index, size) of each."""
        start = self._file.tell()
        chunk = tensor.reshape(*(1 for _ in lead), *tensor.shape).contiguous()
        # torch.save stores all memory behind a view.
        torch.save(chunk if chunk.untyped_storage().nbytes() == chunk.nbytes else chunk.clone(), self._file)
        offsets = (*(index for index, _ in lead), *(0 for _ in tensor.shape))
        sizes = (*(1 for _ in lead), *tensor.shape)
        self.written.shapes[name] = ((*(size for _, size in lead), *tensor.shape), tensor.dtype)
        self.written.chunks.append((name, offsets, sizes, self._stored_since(start)))

    def add_object(self, name: str, pickled: bytes) -> None:
        """Store what `torch.save` made of a list with one object."""
        start = self._file.tell()
        self._file.write(pickled)
        self.written.objects[name] = self._stored_since(start)

    def _stored_since(self, start: int) -> Any:
        return _StorageInfo(self._name, start, self._file.tell() - start)


def write_index(folder: Path, parts: Sequence[Written], common: dict[str, Any]) -> None:
    """Complete a folder whose chunks are written."""
    stored: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, Any] = {}
    for part in parts:
        for name, (shape, dtype) in part.shapes.items():
            stored.setdefault(name, TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), []))
        for name, offsets, sizes, info in part.chunks:
            metadata = stored[name]
            assert isinstance(metadata, TensorStorageMetadata), "no name is a tensor's and an object's"
            metadata.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            places[MetadataIndex(name, torch.Size(offsets), len(metadata.chunks) - 1)] = info
        for name, info in part.objects.items():
            stored[name] = BytesStorageMetadata()
            places[MetadataIndex(name)] = info
    with (folder / INDEX).open("wb") as file:
        pickle.dump(Metadata(stored, planner_data={}, storage_data=places), file)
    torch.save(common, folder / COMMON)
    (folder / FORMAT).write_text(json.dumps(_BACKEND))


def _require_format(folder: Path) -> None:
    path = folder / FORMAT
    if not path.is_file():
        raise CheckpointError(
            str(folder),
            "no distributed checkpoint",
            f"it holds no {FORMAT}.",
            "Give the folder of a Megatron run saved with --ckpt-format torch_dist, or one iter_* or release in it.",
        )
    try:
        backend = json.loads(path.read_text()).get("sharded_backend")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(str(path), "unreadable", f"{error}.", _COPY_AGAIN) from error
    if backend != _BACKEND["sharded_backend"]:
        raise CheckpointError(
            str(path), backend, "only the format torch_dist is read.", "Save with --ckpt-format torch_dist."
        )


def read_index(folder: Path) -> Metadata:
    path = folder / INDEX
    if not path.is_file():
        raise CheckpointError(str(path), "missing", "it is the index of all tensors.", _COPY_AGAIN)
    with _reading(path), path.open("rb") as file:
        metadata = _IndexUnpickler(file).load()
    if not isinstance(metadata, Metadata) or metadata.storage_data is None:
        raise CheckpointError(str(path), "unreadable", "it is no index of tensors.", _COPY_AGAIN)
    return metadata


class _Ignored:
    """Stands for classes of Megatron, which only its own planners need."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


_BUILT = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    },
}
"""What an index is made of: module -> names."""


class _IndexUnpickler(pickle.Unpickler):
    """Builds torch's index and nothing else: a pickle from elsewhere may name any function to be called."""

    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        return super().find_class(module, name) if is_type or name in _BUILT.get(module, ()) else _Ignored


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:  # torch's message advises to run what the file says
        raise CheckpointError(
            str(path), "damaged", "a part of it is not what torch.save writes.", _COPY_AGAIN
        ) from error
    except (OSError, RuntimeError, ValueError, LookupError, AttributeError, TypeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(str(path), "damaged", f"reading it failed: {reason}.", _COPY_AGAIN) from error
