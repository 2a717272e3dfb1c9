"""Architecture as a test: rooms import down only, and foreign code stays at the door."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lockstep

PACKAGE = "lockstep"
SRC = Path(lockstep.__file__).parent

FLOORS: list[set[str]] = [
    {"__main__", "cli"},
    {"loop", "bench", "doctor", "launch", "serve"},
    {"assemble", "run", "observer", "earlier", "sampling", "schedule"},
    {"plan"},
    {"cluster"},
    {"parity", "training_data"},
    {"trainer", "rollout", "weight_sync"},
    {"checkpoint", "data", "rewards", "tracking", "report"},
    {"parallel", "exact"},
    {"models"},
    {"kernels"},
    {"algorithms"},
    {"metrics", "stopping"},
    {"config"},
    {"types", "errors", "option_parser"},
]
"""Rooms from the top floor down. A room may import from its own floor and from those below."""

FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

MAY_NOT_IMPORT = {
    "algorithms": {"torch.distributed", "lockstep.trainer", "lockstep.rollout", "lockstep.cluster", "lockstep.models"},
    "models": {
        "torch.distributed",
        "lockstep.parallel",
        "lockstep.trainer",
        "lockstep.rollout",
        "lockstep.cluster",
        "lockstep.checkpoint",
        "transformers",
    },
    "kernels": {"lockstep.models", "lockstep.trainer", "lockstep.rollout"},
    "config": {"torch", "transformers"},
    "rewards": {"torch", "transformers"},
    "types": {"torch"},
    "errors": {"torch"},
    "cli": {"torch", "transformers"},
}
"""Room -> names it must stay free of at import time."""

ONLY_IN = {"ray": {"cluster"}, "wandb": {"tracking"}, "tensorboard": {"tracking"}, "transformers": {"data", "bench"}}
"""Library -> the rooms that may import it: tokenizers are data's, and a benchmark needs somebody to beat."""

EXCEPTIONS = {("config/checks.py", "lockstep.rewards.registry"): "a command asks at its start which rewards exist"}
"""(file, room above it) -> why it may."""

NEVER = {"sglang", "megatron", "slime", "vllm", "flash_attn", "apex", "transformer_engine"}


def room_of(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imported_names(path: Path, *, source: str | None = None, only_at_import: bool = False) -> set[str]:
    """Every dotted name imported by a file, as an absolute name; type-checking blocks do not count."""
    folder = (PACKAGE, *path.relative_to(SRC).parent.parts)
    names: set[str] = set()

    def visit(node: ast.AST, *, in_function: bool) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        if isinstance(node, ast.Import) and not (in_function and only_at_import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not (in_function and only_at_import):
            base = folder[: len(folder) - node.level + 1] if node.level else ()
            module = ".".join((*base, node.module) if node.module else base)
            names.update({module} | {f"{module}.{alias.name}" for alias in node.names})
        for child in ast.iter_child_nodes(node):
            visit(child, in_function=in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    visit(ast.parse(source if source is not None else path.read_text()), in_function=False)
    return names


def is_inside(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def violations(path: Path, source: str | None = None) -> list[str]:
    room, found = room_of(path), []
    everywhere = imported_names(path, source=source)
    for name in sorted(everywhere):
        parts = name.split(".")
        if any(str(path.relative_to(SRC)) == file and is_inside(name, upper) for file, upper in EXCEPTIONS):
            continue
        if parts[0] == PACKAGE and len(parts) > 1 and parts[1] in FLOOR_OF and FLOOR_OF[parts[1]] < FLOOR_OF[room]:
            found.append(f"{room} may not import {name}: it lives on a higher floor")
        for library, homes in ONLY_IN.items():
            if is_inside(name, library) and room not in homes:
                found.append(f"{room} may not import {name}: only {', '.join(sorted(homes))} may")
        found += [f"{room} may not import {name}" for library in NEVER if is_inside(name, library)]
    for name in sorted(imported_names(path, source=source, only_at_import=True)):
        found += [f"{room} may not import {name}" for banned in MAY_NOT_IMPORT.get(room, ()) if is_inside(name, banned)]
    return found


FILES = sorted(path for path in SRC.rglob("*.py") if path != SRC / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_a_file_lives_in_a_known_room_and_imports_down_only(path: Path) -> None:
    assert room_of(path) in FLOOR_OF, "give the new room its floor in FLOORS"
    assert violations(path) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("algorithms/bad.py", "import torch.distributed as dist"),
        ("algorithms/bad.py", "from torch import distributed"),
        ("algorithms/bad.py", "from ..trainer import local"),
        ("models/layers/bad.py", "from lockstep.rollout.embedded import EmbeddedEngine"),
        ("models/bad.py", "from ..checkpoint import hf"),
        ("trainer/bad.py", "import ray"),
        ("rollout/bad.py", "def f():\n    import sglang.srt"),
        ("checkpoint/bad.py", "from lockstep import loop"),
        ("config/bad.py", "import torch"),
        ("kernels/bad.py", "from lockstep.models.qwen3 import Qwen3"),
        ("trainer/bad.py", "from transformers import AutoModel"),
    ],
)
def test_a_forbidden_import_is_found(path: str, source: str) -> None:
    assert violations(SRC / path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("cluster/good.py", "import ray"),
        ("models/good.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import lockstep.trainer"),
        ("rewards/good.py", "import rayon_like_name"),
        ("trainer/good.py", "from lockstep.models import Qwen3"),
    ],
)
def test_an_allowed_import_is_let_through(path: str, source: str) -> None:
    assert violations(SRC / path, source) == []
