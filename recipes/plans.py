"""Writes what `lockstep plan` prints into the recipes' pages, below the command that prints it.

python recipes/plans.py
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

from lockstep.cli import main as lockstep

HERE = Path(__file__).parent
PLAN = re.compile(r"^(`lockstep (plan [^`]+)` prints\n\n```\n).*?^```$", re.MULTILINE | re.DOTALL)


def with_plan(page: str) -> str:
    """The page as it should read. Call it in the repository's root, which the commands' paths are relative to."""

    def printed(found: re.Match[str]) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            lockstep(shlex.split(found[2]))
        return f"{found[1]}{out.getvalue().strip()}\n```"

    return PLAN.sub(printed, page)


def main() -> None:
    for page in sorted(HERE.glob("*/README.md")):
        page.write_text(with_plan(page.read_text()))


if __name__ == "__main__":
    main()
