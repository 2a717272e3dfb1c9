from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from real_servers import INSTALLED, load

from lockstep.models import LanguageModel

E2E = Path(__file__).parents[1] / "e2e" / "e2e_runs.py"


@pytest.fixture(scope="session", autouse=True)
def environment() -> None:
    """There is a server to test with."""
    if not INSTALLED:
        pytest.fail("run scripts/setup_sglang first, or leave these tests out: scripts/test --without-sglang")


@pytest.fixture(scope="session")
def runs() -> ModuleType:
    """What the end-to-end tests are made of."""
    spec = importlib.util.spec_from_file_location("e2e_runs", E2E)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("e2e_runs", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, runs: ModuleType) -> Any:
    root = tmp_path_factory.mktemp("workshop")
    prepare = runs.load_prepare()
    for side, count in (("train", 64), ("heldout", 8)):
        prepare.write_rows(root / f"{side}.jsonl", prepare.make_prompt_rows(side, count, 0))
    return runs.Workshop(root, runs.write_model(root / "model"), root / "train.jsonl", root / "heldout.jsonl")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, runs: ModuleType) -> list[Path]:
    """Two folders of one tiny Qwen3-MoE with other weights."""
    root = tmp_path_factory.mktemp("models")
    return [runs.write_model(root / name, seed) for seed, name in enumerate("AB")]


@pytest.fixture(scope="module")
def model(folders: list[Path]) -> LanguageModel:
    """What the trainer would hold; tests write into it."""
    return load(folders[0])
