"""`--check-weight-update-equal`: has every server, bit for bit, what it would read from an export?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lockstep.errors import RolloutError
from lockstep.rollout.sglang.api import ServerApi
from lockstep.weight_sync.source import post_to_all

_TIMEOUT_S = 600.0


def verify_equal(servers: Sequence[ServerApi], export: Path, version: str) -> None:
    """Servers digest their weights, overwrite them with noise, load the export and digest again.

    The noise shows that the export, too, reaches every tensor.

    Raises:
        RolloutError: a tensor has another digest.
    """
    sent = [_digests(server) for server in servers]
    disk = {"model_path": str(export.resolve()), "flush_cache": False, "weight_version": version}
    post_to_all(servers, "/weights_checker", [{"action": "reset_tensors"}] * len(servers), _TIMEOUT_S)
    post_to_all(servers, "/update_weights_from_disk", [disk] * len(servers), _TIMEOUT_S)
    for server, before in zip(servers, sent, strict=True):
        after = _digests(server)
        if differing := sorted(name for name in before.keys() | after if before.get(name) != after.get(name)):
            raise RolloutError(
                f"SGLang server {server.url} weights",
                differing[0],
                f"{len(differing)} of {len(after)} tensors were not what an export of version {version} holds.",
                "Use another --update-weight-transport, and report this as a defect.",
            )


def _digests(server: ServerApi) -> dict[str, str]:
    """Of every tensor of every rank."""
    answer = server.post("/weights_checker", {"action": "checksum"}, timeout_s=_TIMEOUT_S)
    ranks = answer["ranks"]
    return {f"{name} (rank {rank})": digest for rank, r in enumerate(ranks) for name, digest in r["checksums"].items()}
