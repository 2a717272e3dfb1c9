from __future__ import annotations

import math

import pytest

from lockstep.config.hooks import load_function
from lockstep.errors import OptionError


def test_a_module_path_gives_the_function():
    assert load_function("math.hypot") is math.hypot


def test_a_file_path_gives_the_function_of_one_module_per_file(tmp_path):
    hook = tmp_path / "hook.py"
    hook.write_text(
        "count = 0\ndef bump():\n    global count\n    count += 1\n    return count\ndef again(): return bump()\n"
    )
    assert load_function(f"{hook}:bump")() == 1
    assert load_function(f"{hook}:again")() == 2


def test_slimes_own_filter_is_ours():
    found = load_function("slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std")
    assert found.__module__ == "lockstep.rollout.hooks"


def test_every_other_slime_path_leads_to_something_of_ours():
    from lockstep.config.hooks import SLIME_PATHS

    for path in SLIME_PATHS:
        assert load_function(path).__module__.startswith("lockstep.")


@pytest.mark.parametrize(
    ("path", "reason", "remedy"),
    [
        ("nodots", "names no module", "package.module.function"),
        ("no_such_package.f", "ModuleNotFoundError", "importable"),
        ("math.no_such", "math has no no_such", "Check the name"),
        ("math.pi", "pi is a float, which cannot be called", "Check the name"),
        ("gone/hook.py:f", "no file", "existing Python file"),
        ("slime.utils.types.Sample", "ModuleNotFoundError", "import Sample from lockstep.types"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(path, reason, remedy):
    with pytest.raises(OptionError) as caught:
        load_function(path, "--custom-rm-path")
    error = caught.value
    assert (error.field, error.value) == ("--custom-rm-path", path)
    assert reason in error.reason
    assert remedy in error.remedy


def test_a_file_that_is_named_like_a_module_is_pointed_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards_of_mine.py").write_text("from slime.utils.types import Sample\n")
    with pytest.raises(OptionError, match=r"Write rewards_of_mine.py:f\."):
        load_function("rewards_of_mine.f")
    with pytest.raises(OptionError, match=r"Write rewards_of_mine.py:NAME, "):
        load_function("rewards_of_mine.py")
    with pytest.raises(OptionError, match="slime is not needed: import Sample"):
        load_function("rewards_of_mine.py:f")


def test_a_name_that_a_file_does_not_hold_is_missed_in_that_file(tmp_path):
    hook = tmp_path / "hook.py"
    hook.write_text("x = 1\n")
    with pytest.raises(OptionError, match=rf": {hook} has no f\."):
        load_function(f"{hook}:f")


def test_a_file_that_fails_says_how_and_can_be_mended(tmp_path):
    hook = tmp_path / "hook.py"
    hook.write_text("1 / 0")
    with pytest.raises(OptionError, match="ZeroDivisionError"):
        load_function(f"{hook}:f")
    hook.write_text("def f(): return 'mended'")
    assert load_function(f"{hook}:f")() == "mended"
