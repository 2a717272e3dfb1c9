"""Weights by way of an HF folder, which every server must be able to read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lockstep.rollout.sglang.api import ServerApi
from lockstep.weight_sync.source import WeightSource, post_to_all


class DiskTransport:
    """Export, then let the servers load the folder. It takes any layout of the trainer, and the longest."""

    def __init__(self, folder: Path, *, timeout_s: float) -> None:
        self.folder = folder
        self.timeout_s = timeout_s

    def send(self, servers: Sequence[ServerApi], source: WeightSource, version: str) -> None:
        assert source.export is not None, "this is the controller"
        source.export(self.folder)
        body = {"model_path": str(self.folder.resolve()), "flush_cache": False, "weight_version": version}
        post_to_all(servers, "/update_weights_from_disk", [body] * len(servers), self.timeout_s)

    def forget(self) -> None:
        """Nothing ties the servers together."""

    def close(self, servers: Sequence[ServerApi]) -> None:
        """The folder stays: a server may be started from it."""
