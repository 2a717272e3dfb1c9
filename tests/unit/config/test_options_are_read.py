"""An option that nobody reads promises what does not happen. Here none is, unless its page says why."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from lockstep.config.compatibility import FLAGS, Status
from lockstep.config.config import GROUPS, HOME

PACKAGE = Path(__file__).parents[3] / "lockstep"
OWNERS = {*GROUPS, "args", "_args", "options", "optimizer_options"}
"""What the code calls an object that has options as attributes."""


def names_read(tree: ast.AST, owners: set[str]) -> set[str]:
    """Attributes that are read of an object with one of these names: `config.optimizer.lr`, `args.lr`."""
    reads = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)]
    return {node.attr for node in reads if _last_name(node.value) in owners}


def _last_name(node: ast.expr) -> str | None:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None


def options_read() -> set[str]:
    """Options that code outside lockstep/config reads, itself or through a property of their group."""
    config = PACKAGE / "config"
    outside = {path for path in PACKAGE.rglob("*.py") if config not in path.parents}
    outside |= {config / "config.py", config / "parsing.py"}
    found = set().union(*(names_read(ast.parse(path.read_text()), OWNERS) for path in outside))
    for path in config.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name in found - HOME.keys():
                found |= names_read(node, {"self"})
    return found


def has_one_value(name: str) -> bool:
    annotation = GROUPS[HOME[name]].model_fields[name].annotation
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1


def needs_no_reader(name: str) -> bool:
    """It cannot be set to anything else, or docs/compatibility.md says why its value changes nothing."""
    return has_one_value(name) or (name in FLAGS and FLAGS[name].status in (Status.ACCEPTED, Status.LATER))


def test_the_search_sees_reads_of_options_only():
    source = "a = config.optimizer.lr + args.seed\noptions.min_lr = self.weight_decay\nclip_grad"
    assert names_read(ast.parse(source), OWNERS) == {"lr", "seed"}


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_is_read_or_says_why_not(group):
    found = options_read()
    assert [n for n in GROUPS[group].model_fields if n not in found and not needs_no_reader(n)] == []


def test_every_flag_that_is_the_same_as_slimes_is_read():
    same = [entry.name for entry in FLAGS.values() if entry.status is Status.SAME]
    found = options_read()
    assert [name for name in same if name not in found and not has_one_value(name)] == []
