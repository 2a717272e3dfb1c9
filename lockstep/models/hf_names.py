"""Where the tensors of an HF folder stand in our parameters: said once, played by loading and by export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class HfTensor:
    """A tensor by its name on disk; it holds what `parameter[index]` holds, in the same shape."""

    name: str
    index: tuple[int | slice, ...] = ()


def hf_tensors(name: str, shape: Sequence[int]) -> Iterator[HfTensor]:
    """The HF tensors that make up our parameter of that name and shape; each number of it stands in one of them.

    Only the stacked experts differ from HF: `experts.gate_up_proj` [E, 2 I, D] holds `experts.{e}.gate_proj.weight`
    over `experts.{e}.up_proj.weight`, and `experts.down_proj` [E, D, I] holds `experts.{e}.down_proj.weight`.
    """
    prefix, _, kind = name.rpartition(".")
    if not prefix.endswith(".experts"):
        yield HfTensor(name)
        return
    half = shape[1] // 2
    for expert in range(shape[0]):
        if kind == "down_proj":
            yield HfTensor(f"{prefix}.{expert}.down_proj.weight", (expert,))
        else:
            yield HfTensor(f"{prefix}.{expert}.gate_proj.weight", (expert, slice(0, half)))
            yield HfTensor(f"{prefix}.{expert}.up_proj.weight", (expert, slice(half, 2 * half)))
