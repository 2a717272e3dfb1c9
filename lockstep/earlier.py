"""What earlier runs left in a folder is moved aside, never overwritten and never mixed with the new run's."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def set_aside(folder: Path, names: Iterable[str]) -> Path | None:
    """Move those of `names` that exist in `folder` into a new `folder/earlier-N`; returns it, or None for no names."""
    existing = [name for name in names if (folder / name).exists()]
    if not existing:
        return None
    number = 1
    while (folder / f"earlier-{number}").exists():
        number += 1
    aside = folder / f"earlier-{number}"
    aside.mkdir()
    for name in existing:
        (folder / name).rename(aside / name)
    return aside
