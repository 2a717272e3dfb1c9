"""Rollouts on disk, to train on or to look at: `--save-debug-rollout-data`, `--load-debug-rollout-data`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from lockstep.errors import DataError, writing
from lockstep.trainer.batch import TrainSample
from lockstep.types import Group, Sample


def save_rollout(template: str, rollout_id: int | str, groups: list[Group]) -> None:
    """Write `{"rollout_id", "samples": [dict]}` as slime does, to the path with its `{rollout_id}` filled in."""
    path = Path(template.format(rollout_id=rollout_id))
    samples = [_plain(sample) for group in groups for sample in group]
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"rollout_id": rollout_id, "samples": samples}, path)


def save_train_data(template: str, rollout_id: int, samples: Sequence[TrainSample]) -> None:
    """Write what training gets, one dict a sample, with torch.save to the path with its `{rollout_id}` filled in."""
    path = Path(template.format(rollout_id=rollout_id))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save([vars(sample) for sample in samples], path)


def load_rollout(template: str, rollout_id: int, *, subsample: float | None = None) -> list[Group]:
    """Read what `save_rollout` wrote; neighbours with equal `group_index` form a group.

    Args:
        subsample: keep only this fraction of the groups, the first ones.
    Raises:
        DataError: no such file, or it is not a saved rollout.
    """
    path = Path(template.format(rollout_id=rollout_id))
    if not path.is_file():
        raise DataError(
            "--load-debug-rollout-data",
            str(path),
            "there is no such file.",
            "Save one with --save-debug-rollout-data, or lower --num-rollout.",
        )
    try:
        content = torch.load(path, weights_only=True)
        samples = [Sample.from_dict(values) for values in content["samples"]]
    except Exception as error:
        raise DataError(
            "--load-debug-rollout-data",
            str(path),
            f"it is not a saved rollout ({type(error).__name__}: {str(error).splitlines()[0]}).",
            "Give a file that --save-debug-rollout-data wrote.",
        ) from error
    for sample in samples:
        if sample.rollout_routed_experts is not None:
            sample.rollout_routed_experts = np.asarray(sample.rollout_routed_experts)
    groups = [list(members) for _, members in groupby(samples, key=lambda s: s.group_index)]
    return groups if subsample is None else groups[: max(1, round(len(groups) * subsample))]


def _plain(sample: Sample) -> dict[str, object]:
    values = sample.to_dict()
    if sample.rollout_routed_experts is not None:
        values["rollout_routed_experts"] = torch.from_numpy(np.array(sample.rollout_routed_experts))
    return values
