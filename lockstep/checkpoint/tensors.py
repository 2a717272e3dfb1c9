"""Named tensors on disk in PyTorch's distributed-checkpoint format, which reshards when layouts change."""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from lockstep.checkpoint.training import how_to_go_on_without
from lockstep.errors import CheckpointError


def save_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write the tensors into `folder`, which exists.

    Raises:
        OSError, RuntimeError: the system refuses; torch says RuntimeError where a disk is full.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            save(
                tensors,
                storage_writer=FileSystemWriter(str(folder), sync_files=True),
                no_dist=not dist.is_initialized(),
            )
        except CheckpointException as error:
            raise _first_cause(error) from error


def load_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill the given tensors in place with those of the same names in `folder`.

    Raises:
        CheckpointError: a name or shape is not there, or a file is damaged.
    """
    try:
        with warnings.catch_warnings(), _without_tracebacks():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load(tensors, storage_reader=FileSystemReader(str(folder)), no_dist=not dist.is_initialized())
    except (
        CheckpointException,
        RuntimeError,
        ValueError,
        KeyError,
        OSError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        raise CheckpointError(
            str(folder),
            "unreadable",
            f"its tensors do not fit this model, or a file is damaged: {_first_line(_first_cause(error))}.",
            f"Resume with the model that wrote it. Or: {how_to_go_on_without(folder)}",
        ) from error


def tensor_names(folder: Path) -> set[str]:
    """What `save_tensors` has written there; nothing where it cannot be read."""
    try:
        return set(FileSystemReader(str(folder)).read_metadata().state_dict_metadata)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError):
        return set()


@contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Keep torch from printing the traceback of an error that we report."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _first_cause(error: BaseException) -> BaseException:
    if isinstance(error, CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
