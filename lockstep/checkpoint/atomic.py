"""Directories that are either whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lockstep.errors import CheckpointError, LockstepError

TEMPORARY_SUFFIX = ".incomplete"
_REPLACED_SUFFIX = ".replaced"
_FULL_BYTES = 2**20
"""A disk with less free space than this is called full."""


@contextmanager
def atomic_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling to fill; on success it is flushed to disk and renamed to `path`.

    A crash at any moment leaves either the whole directory or none (and a sibling ending in `.incomplete`, which the
    next write of the same path removes).

    Args:
        replace: an earlier directory of this name gives way, in the instant between two renames.
    Raises:
        CheckpointError: the disk is full or not writable; the temporary directory is removed first.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    replaced = path.with_name(path.name + _REPLACED_SUFFIX)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            _flush(file)
        _flush(temporary)
        if replace and path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            path.rename(replaced)
        temporary.rename(path)
        _flush(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except LockstepError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # the last two are torch's and safetensors' full disk
        reason = _reason(error, path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            str(path),
            "not written",
            reason,
            "Free space or fix the permissions of its folder; earlier checkpoints are untouched.",
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _reason(error: Exception, path: Path) -> str:
    """Why writing failed. To be asked while what was written is still there, and with it the lack of space."""
    if isinstance(error, OSError):
        return f"the system says: {error.strerror or error}."
    if path.parent.exists() and shutil.disk_usage(path.parent).free < _FULL_BYTES:
        return "the disk is full."
    return f"writing failed ({type(error).__name__}: {str(error).splitlines()[0]})."


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
