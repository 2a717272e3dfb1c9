"""The flat view of the options that hooks receive as `args`."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from lockstep.errors import OptionError

HIDDEN = "***"
"""What hooks read in place of a secret."""


class Args:
    """All options by slime's names (`args.rollout_batch_size`), read-only and picklable.

    A slime option that Lockstep has not got reads as slime's neutral value, so hooks that look at it keep working.
    """

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any]) -> None:
        object.__setattr__(self, "_values", dict(values))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(f"args has no option {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"args.{name} cannot be set: options are read-only, so that every process sees the same ones. "
            "Keep what a hook needs in sample.metadata."
        )

    def __getstate__(self) -> dict[str, Any]:
        return dict(self._values)

    def __setstate__(self, values: dict[str, Any]) -> None:
        object.__setattr__(self, "_values", values)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __dir__(self) -> list[str]:
        return sorted(self._values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Args) and self._values == other._values

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"Args({len(self._values)} options)"


def read_custom_values(path: str, known: Container[str]) -> dict[str, Any]:
    """The values of `--custom-config-path`, by name.

    Args:
        known: names that may not be set there.
    Raises:
        OptionError: the file is missing or no YAML mapping, or one of its names is an option or no name at all.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(
            "--custom-config-path", path, f"it cannot be read: {error}.", "Give the path of a YAML file."
        ) from error
    if not isinstance(values, dict):
        raise OptionError("--custom-config-path", path, "it holds no mapping.", "Write lines of NAME: value.")
    for name, value in values.items():
        if not (isinstance(name, str) and name.isidentifier()):
            raise OptionError(
                "--custom-config-path", name, "hooks could not read this as args.NAME.", "Use letters, digits and _."
            )
        if name in known:
            raise OptionError(
                f"--custom-config-path {path} ({name})",
                value,
                "it is an option, and options live in one place.",
                "Write it into the recipe, or give it as a flag.",
            )
    return values
