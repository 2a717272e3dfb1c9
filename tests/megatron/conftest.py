"""The environment of scripts/setup_megatron, and processes of it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
Oracle = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """Runs oracle.py in `processes` processes and returns its logits and the weights that mbridge exports."""
    subprocess.run([ROOT / "scripts/setup_megatron"], check=True, timeout=600)

    def run(*words: str | Path, processes: int = 1) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("oracle")
        command = [
            ROOT / ".venv-megatron/bin/python", Path(__file__).with_name("oracle.py"), *words,
            "--out", folder / "out.pt", "--meeting", folder / "meeting", "--world-size", str(processes),
        ]  # fmt: skip
        running = [
            subprocess.Popen(
                [*command, "--rank", str(rank)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            )
            for rank in range(processes)
        ]
        said = [process.communicate(timeout=300)[0] for process in running]
        assert [process.returncode for process in running] == [0] * processes, "\n".join(said)
        found: dict[str, Any] = torch.load(folder / "out.pt")
        return found

    return run
