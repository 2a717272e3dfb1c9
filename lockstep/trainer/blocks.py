"""Blocks of 8-bit moments in checkpoints: what makes those of one layout unreadable in another, and who says so."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lockstep.checkpoint.tensors import tensor_names
from lockstep.errors import CheckpointError

CUT = ".cut_over_"
"""Marks the scales of blocks that end where a shard ends, before the number of shards."""


def require_the_same_blocks(folder: Path, names: Iterable[str]) -> None:
    """Refuse a checkpoint whose blocks of 8-bit moments end elsewhere than in the state of these names.

    Raises:
        CheckpointError: naming the first such weight.
    """
    there = tensor_names(folder)
    for name in names:
        whole, _, parts = name.partition(CUT)
        if name in there or "_scale" not in whole:
            continue
        if written := [other for other in there if other == whole or other.startswith(whole + CUT)]:
            raise CheckpointError(
                f"{folder} {whole.removeprefix('optimizer.')}",
                f"cut over {written[0].partition(CUT)[2] or 1} ranks",
                f"a block of 8-bit moments must not cross ranks, and here {parts or 1} share it.",
                "Resume with the --tensor-model-parallel-size that wrote it, or save with --no-save-optim.",
            )
