"""Training checkpoints: one atomic directory per save, holding everything that a run needs to go on.

SAVE/rollout_0000009/      after rollout 9 (counted from 0)
    *.distcp, .metadata    weights, optimizer, a moved reference model
    state.json             counters, data cursor, buffer, random states
    config.toml            the resolved options
"""

from __future__ import annotations

import base64
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lockstep.checkpoint.atomic import TEMPORARY_SUFFIX, atomic_directory
from lockstep.errors import CheckpointError

_NAME = re.compile(r"rollout_(\d{7})")


def checkpoint_folder(root: Path, rollout_id: int) -> Path:
    return root / f"rollout_{rollout_id:07d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Whole checkpoints, oldest first. Unfinished ones have another name and are not seen."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if _NAME.fullmatch(path.name))


def find_checkpoint(load: Path) -> Path | None:
    """The checkpoint that `--load` means: the folder itself if it is one, else the newest inside; None if empty.

    Raises:
        CheckpointError: the folder holds something else.
    """
    if load.exists() and not load.is_dir():
        raise CheckpointError("--load", str(load), "it is a file.", "Give the --save folder of a run.")
    if (load / "state.json").is_file():
        return load
    found = list_checkpoints(load)
    if found:
        return found[-1]
    if load.is_dir() and not all(_is_left_over(path) for path in load.iterdir()):
        raise CheckpointError(
            "--load",
            str(load),
            "the folder is not empty, but holds no training checkpoint (rollout_0000000 and so on).",
            "Give the --save folder of a run; HF weights belong to --hf-checkpoint.",
        )
    return None


def _is_left_over(path: Path) -> bool:
    """What a run that has saved nothing yet may find: an unfinished save, and what `earlier.set_aside` moved."""
    return path.name.endswith(TEMPORARY_SUFFIX) or path.name.startswith("earlier-")


def how_to_go_on_without(folder: Path) -> str:
    """The remedy for a damaged checkpoint."""
    earlier = [path for path in list_checkpoints(folder.parent) if path.name < folder.name]
    if not earlier:
        return "There is no earlier checkpoint; start again without --load."
    return f"Resume from an earlier checkpoint: --load {earlier[-1]}."


def save_checkpoint(
    root: Path, rollout_id: int, *, state: dict[str, Any], config_toml: str, save_tensors: Callable[[Path], None]
) -> Path:
    """Write a checkpoint atomically and return its folder."""
    folder = checkpoint_folder(root, rollout_id)
    _delete_unfinished(root)
    with atomic_directory(folder) as temporary:
        save_tensors(temporary)
        (temporary / "config.toml").write_text(config_toml)
        (temporary / "state.json").write_text(json.dumps(state))
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            str(folder / "state.json"), "unreadable", f"{error}.", how_to_go_on_without(folder)
        ) from error
    return state


def delete_old_checkpoints(root: Path, keep_last: int) -> None:
    """Delete all but the newest; a kill on the way leaves no half-deleted folder under a checkpoint's name."""
    for folder in list_checkpoints(root)[:-keep_last]:
        folder.rename(folder.with_name(folder.name + TEMPORARY_SUFFIX))
    _delete_unfinished(root)


def _delete_unfinished(root: Path) -> None:
    """Remove what kills left behind in the middle of a save or of a deletion."""
    for folder in root.glob(f"rollout_*{TEMPORARY_SUFFIX}"):
        shutil.rmtree(folder, ignore_errors=True)


def random_states() -> dict[str, Any]:
    """Global random states as JSON: user hooks may draw from them. Lockstep's own draws never touch them."""
    version, internal, gauss = random.getstate()
    of_numpy: Any = np.random.get_state(legacy=False)
    of_numpy["state"]["key"] = of_numpy["state"]["key"].tolist()
    return {
        "python": [version, list(internal), gauss],
        "numpy": of_numpy,
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
    }


def restore_random_states(states: dict[str, Any]) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    of_numpy = states["numpy"]
    key = np.array(of_numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state(of_numpy | {"state": of_numpy["state"] | {"key": key}})
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(states["torch"])), dtype=torch.uint8))
