"""`lockstep convert`: what its two ways do once their words are read, alone or in each process of torchrun."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lockstep.checkpoint.hf.folder import OnBytes, read_hf_config
from lockstep.checkpoint.megatron.ranks import Ranks, ranks_of_torchrun
from lockstep.checkpoint.megatron.to_hf import torch_dist_to_hf
from lockstep.checkpoint.megatron.to_torch_dist import hf_to_torch_dist
from lockstep.tracking.transfer import TransferProgress

CheckModel = Callable[[Mapping[str, Any]], None]
"""Raises when the given shape flags describe another model than config.json."""


def run_hf_to_torch_dist(hf_checkpoint: Path, save: Path, check_model: CheckModel) -> int:
    """Convert, with a bar of the first process's bytes; the folder's name is printed at the end."""

    def work(ranks: Ranks, on_bytes: OnBytes | None) -> None:
        check_model(read_hf_config(hf_checkpoint))
        hf_to_torch_dist(hf_checkpoint, save, ranks=ranks, on_bytes=on_bytes)

    return _run(work, save)


def run_torch_dist_to_hf(load: Path, hf_checkpoint: Path, save_hf: Path) -> int:
    """Convert, with a bar of the first process's bytes; the folder's name is printed at the end."""

    def work(ranks: Ranks, on_bytes: OnBytes | None) -> None:
        notes = torch_dist_to_hf(load, hf_checkpoint, save_hf, ranks=ranks, on_bytes=on_bytes)
        for note in notes if ranks.rank == 0 else ():
            print(f"lockstep: note: {note}", file=sys.stderr)

    return _run(work, save_hf)


def _run(work: Callable[[Ranks, OnBytes | None], None], target: Path) -> int:
    with ranks_of_torchrun() as ranks:
        label = "converting" if ranks.size == 1 else f"converting, part 1 of {ranks.size}"
        with TransferProgress(label) if ranks.rank == 0 else nullcontext() as progress:
            try:
                work(ranks, progress)
            except Exception:
                if ranks.rank == 0:
                    raise
                return 1  # the first process tells
    if ranks.rank == 0:
        print(target)
    return 0
