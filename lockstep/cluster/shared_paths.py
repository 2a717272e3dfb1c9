"""Paths that all machines of a run must see alike, checked before anything is loaded.

The controller says what it sees, nodes compare: `Expected.of` there, `complaint` here.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lockstep.checkpoint.training import find_checkpoint
from lockstep.config import Config
from lockstep.errors import OptionError, writing
from lockstep.rollout.sglang.open import weights_folder

_SEEN_WITHIN_S = 5.0
"""Network file systems show a new file a little later."""


@dataclass(frozen=True)
class Expected:
    """One path as the controller sees it."""

    option: str
    path: str
    """Absolute."""
    files: tuple[tuple[str, int], ...] | None
    """Names and bytes of the files that all nodes must read alike; None where they write."""
    marker: str | None = None
    """A file that the controller has just made there, for those that write."""

    def complaint(self) -> str | None:
        """What is wrong with the path on the machine that calls this; None is nothing."""
        folder = Path(self.path)
        if self.files is not None:
            if not folder.is_dir():
                return "there is no such folder"
            here = dict(_files(folder))
            for name, size in self.files:
                if here.get(name) != size:
                    return f"{name} has {here[name]} bytes, not {size}" if name in here else f"{name} is missing"
            return None
        assert self.marker is not None, "the controller has left a file where nodes write"
        deadline = time.monotonic() + _SEEN_WITHIN_S
        while not (folder / self.marker).exists():
            if time.monotonic() > deadline:
                return "it is another folder than the controller's" if folder.is_dir() else "there is no such folder"
            time.sleep(0.1)
        try:
            with tempfile.TemporaryFile(dir=folder):
                return None
        except OSError as error:
            return f"it cannot be written to ({error.strerror or error})"

    def error(self, node: str, complaint: str) -> OptionError:
        return OptionError(
            self.option,
            self.path,
            f"on node {node} {complaint}.",
            "Put it on a file system that all nodes mount at the same place"
            + (", or copy the folder to the same place on each." if self.files is not None else "."),
        )


@contextmanager
def expected_paths(config: Config) -> Iterator[list[Expected]]:
    """What nodes read and write in a run of this config; the files that show it are removed at the end.

    Prompts and held-out sets are not among them: the controller alone reads those.
    """
    checkpoint = config.checkpoint
    read = {"--hf-checkpoint": config.model.hf_checkpoint}
    if config.algorithm.use_kl_loss and checkpoint.ref_load is not None:
        read["--ref-load"] = checkpoint.ref_load
    if checkpoint.load is not None and (newest := find_checkpoint(Path(checkpoint.load))) is not None:
        read["--load"] = str(newest)
    written = {"--save": checkpoint.save}
    if checkpoint.save_hf is not None:
        written["--save-hf"] = str(Path(checkpoint.save_hf.format(rollout_id=0)).parent)
    if config.rollout.rollout_engine == "sglang" and not config.sglang.rollout_external_engine_addrs:
        # A server that starts again reads its weights there.
        written["--update-weight-disk-dir"] = str(weights_folder(config))
    found = [Expected(option, str(Path(path).resolve()), _files(Path(path))) for option, path in read.items()]
    with ExitStack() as stack:
        for option, path in written.items():
            if path is None:
                continue
            with writing(Path(path)):
                Path(path).mkdir(parents=True, exist_ok=True)
                marker = stack.enter_context(tempfile.NamedTemporaryFile(dir=path, prefix=".lockstep-seen-"))
            found.append(Expected(option, str(Path(path).resolve()), None, Path(marker.name).name))
        yield found


def _files(folder: Path) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((path.name, path.stat().st_size) for path in folder.iterdir() if path.is_file()))
