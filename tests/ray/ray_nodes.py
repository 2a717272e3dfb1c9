"""Nodes of a Ray cluster for tests: see raylets.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ENV = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
"""Of the cluster and of the runs on it, whatever secret of Ray's this machine has."""


class RayNodes:
    """Nodes of a real Ray cluster on this machine, of one CPU each, beside a head without any."""

    def __init__(self, log: Path) -> None:
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "raylets.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | ENV,
            )
        self.log = log
        self.address: str = self._answer()
        self.raylets: dict[str, int] = {}

    def add(self, address: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"node {address} 1\n")
        self._process.stdin.flush()
        (self.raylets[address],) = self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                return json.loads(line)
            except ValueError:
                continue  # Ray talks
        raise AssertionError(f"the cluster did not start:\n{self.log.read_text()}")

    def close(self) -> None:
        try:
            self._process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
