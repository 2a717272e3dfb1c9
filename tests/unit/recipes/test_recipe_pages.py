"""The recipes' pages say what `lockstep plan` says today, and every recipe fits the machine that its page names."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]
PAGES = sorted((ROOT / "recipes").glob("qwen3-*/README.md"))


def load_plans() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipe_plans", ROOT / "recipes" / "plans.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


plans = load_plans()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_a_page_shows_the_plan_of_today_and_it_fits(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails: `python recipes/plans.py` writes the pages again."""
    monkeypatch.chdir(ROOT)
    text = page.read_text()
    assert plans.with_plan(text) == text
    assert "\nIt fits: " in text


def test_every_recipe_is_listed() -> None:
    listed = (ROOT / "recipes" / "README.md").read_text()
    assert [page.parent.name for page in PAGES if f"]({page.parent.name}/README.md)" not in listed] == []
