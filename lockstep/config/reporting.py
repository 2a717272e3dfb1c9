"""Turning what is wrong with an option into one error with four parts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from lockstep.errors import OptionError


def flag_of(name: str) -> str:
    """`rollout_batch_size` as the user types it: `--rollout-batch-size`."""
    return "--" + name.replace("_", "-")


def unknown_option(shown: str, value: Any, name: str, known: Iterable[str], where: str = "") -> OptionError:
    """The error for a name that is no option.

    Args:
        shown: the name as the user wrote it.
        name: the same with underscores, to find the closest of `known`.
        where: the table or file it stood in.
    """
    closest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    style = flag_of if shown.startswith("--") else str
    remedy = f"Did you mean {style(closest[0])}?" if closest else "`lockstep train --help` lists all options."
    return OptionError(shown, value, f"there is no such option{where}.", remedy)


def unknown_table(name: str, known: Iterable[str]) -> OptionError:
    """The error for a TOML table that nothing belongs to."""
    tables = sorted(known)
    closest = difflib.get_close_matches(name, tables, n=1, cutoff=0.6)
    remedy = f"Did you mean [{closest[0]}]?" if closest else f"The tables are {', '.join(tables)}."
    return OptionError("table", f"[{name}]", "there is no such table.", remedy)


def first_error(error: ValidationError) -> OptionError:
    """The first thing that pydantic found wrong, in our words."""
    found = error.errors()[0]
    cause = found.get("ctx", {}).get("error")
    if isinstance(cause, OptionError):
        return cause
    names = [part for part in found["loc"] if isinstance(part, str)]
    field = flag_of(names[1]) if len(names) > 1 else ".".join(names)
    if found["type"] == "missing":
        return OptionError(field, None, "it is required.", f"Give {field}, or set it in the recipe.")
    reason, remedy = _explain(found["type"], found.get("ctx", {}), found["msg"])
    return OptionError(field, found["input"], reason, remedy)


def _explain(kind: str, context: dict[str, Any], message: str) -> tuple[str, str]:
    bounds = {
        "greater_than": ("gt", "above"),
        "greater_than_equal": ("ge", "at least"),
        "less_than": ("lt", "below"),
        "less_than_equal": ("le", "at most"),
    }
    if kind in bounds:
        key, words = bounds[kind]
        return f"it must be {words} {context[key]:g}.", f"Give a value {words} {context[key]:g}."
    if kind == "literal_error":
        choices = context["expected"].replace("'", "")
        return f"it must be {choices}.", f"Give {choices}."
    for start, noun in (
        ("int", "a whole number"),
        ("float", "a number"),
        ("bool", "true or false"),
        ("dict", "a table"),
    ):
        if kind.startswith(f"{start}_"):
            return f"it must be {noun}.", f"Give {noun}."
    if kind == "finite_number":
        return "it must be a finite number.", "Give a finite number."
    if kind in ("string_type", "string_too_short"):
        return "it must be text.", "Give a text, in quotes in a recipe."
    if kind in ("tuple_type", "list_type"):
        return "it must be a list.", "Give a list, such as [1, 2] in a recipe or words after the flag."
    return f"{message[0].lower()}{message[1:]}.", "Compare with docs/options.md."
