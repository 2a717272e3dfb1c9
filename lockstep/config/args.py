"""The flat view of the options that hooks receive as `args`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


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
