from __future__ import annotations

from pathlib import Path

from lockstep.config.compatibility import FLAGS
from lockstep.config.config import HOME
from lockstep.config.docs import compatibility_page, options_page

DOCS = Path(__file__).parents[3] / "docs"


def test_the_options_page_is_current():
    """If this fails: python -m lockstep.config.docs"""
    assert (DOCS / "options.md").read_text() == options_page()


def test_the_compatibility_page_is_current():
    """If this fails: python -m lockstep.config.docs"""
    assert (DOCS / "compatibility.md").read_text() == compatibility_page()


def test_the_pages_name_every_option_and_every_slime_flag():
    options, compatibility = options_page(), compatibility_page()
    assert [n for n in HOME if f"| `--{n.replace('_', '-')}` |" not in options] == []
    assert [f.flag for f in FLAGS.values() if f"| `{f.flag}` | {f.status} |" not in compatibility] == []
