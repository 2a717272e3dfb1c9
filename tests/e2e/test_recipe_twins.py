"""Every recipe really trains: small, with its own options, on CPUs, and in every layout with the same gradients."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = sorted(folder.name for folder in (ROOT / "recipes").glob("qwen3-*"))


@pytest.fixture(scope="module")
def steps_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs a recipe's twin once; the steps that it logged."""

    @cache
    def run(recipe: str) -> list[dict[str, Any]]:
        output = tmp_path_factory.mktemp(recipe)
        command = [sys.executable, "recipes/twin.py", f"recipes/{recipe}", "--output", str(output)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
        rows = [json.loads(line) for line in (output / "run" / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if "train/grad_norm" in row]

    return run


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_small(recipe: str, steps_of: Any) -> None:
    first, _ = steps_of(recipe)
    assert 0 < first["train/grad_norm"] < 100
    # bf16 rounds a logit of 4 to steps of 0.03, and a mean over some hundred tokens is a small part of that.
    assert first["train/train_rollout_logprob_abs_diff"] < 5e-3


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_layout_of_a_model_has_the_same_gradient(recipe: str, steps_of: Any) -> None:
    """Samples are the same, because their random numbers do not depend on the layout; sums are in another order."""
    first = next(name for name in RECIPES if family(name) == family(recipe))
    # bf16 has 8 bits: products and sums that are rounded elsewhere move a norm by some thousandths.
    assert steps_of(recipe)[0]["train/grad_norm"] == pytest.approx(steps_of(first)[0]["train/grad_norm"], rel=1e-2)


def family(recipe: str) -> str:
    return recipe.rsplit("-", 1)[0]
