"""Directories that are either whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lockstep.errors import CheckpointError

TEMPORARY_SUFFIX = ".incomplete"


@contextmanager
def atomic_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling to fill; on success it is flushed to disk and renamed to `path`.

    A crash at any moment leaves either the whole directory or none (and a sibling ending in `.incomplete`, which the
    next write of the same path removes).

    Raises:
        CheckpointError: the disk is full or not writable; the temporary directory is removed first.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            _flush(file)
        _flush(temporary)
        if replace and path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
        _flush(path.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            str(path),
            "not written",
            f"the system says: {error.strerror or error}.",
            "Free space or fix the permissions of its folder; earlier checkpoints are untouched.",
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
