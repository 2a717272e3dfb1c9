r"""Reading the answer out of `\boxed{...}`."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` (or `\fbox{...}`), None when there is none or its braces never close.

    Escaped braces belong to the content: `\boxed{\{1, 2\}}` gives `\{1, 2\}`.
    """
    start = max((match.end() for match in _BOX.finditer(text)), default=None)
    if start is None:
        return None
    depth, position = 1, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start:position]
        position += 1
    return None
