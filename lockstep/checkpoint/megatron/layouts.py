"""How HF tensors become Megatron-Core's and back, bit for bit; each layout is played both ways.

D is any trailing width: the model's for a weight, none for a bias. N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.errors import ModelError

_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


class Layout(Protocol):
    """Both directions are computed on `meta` tensors, too: that is how the shapes of Megatron's side are known."""

    keeps_dtype: ClassVar[bool]
    """Whether Megatron's tensors have the type of HF's."""

    def to_megatron(self, parts: Sequence[Tensor]) -> list[Tensor]: ...

    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]: ...


@dataclass(frozen=True)
class Same:
    """One tensor, which is the same on both sides."""

    keeps_dtype: ClassVar[bool] = True

    def to_megatron(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return list(parts)

    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors)


@dataclass(frozen=True)
class GateOverUp:
    """HF's gate and up projection, [F, D] each, are Megatron's linear_fc1, [2 F, D]."""

    keeps_dtype: ClassVar[bool] = True

    def to_megatron(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(parts))]

    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors[0].chunk(2))


@dataclass(frozen=True)
class GroupedHeads:
    """HF's q, k and v are Megatron's linear_qkv: key/value head by head its queries, (their gates,) its key, its value.

    With an output gate HF's q_proj holds, head by head, H rows of query and H rows of gate; Megatron holds all queries
    of a key/value head before their gates.
    """

    num_key_value_heads: int
    head_dim: int
    is_gated: bool

    keeps_dtype: ClassVar[bool] = True

    def to_megatron(self, parts: Sequence[Tensor]) -> list[Tensor]:
        q, k, v = (part.unflatten(0, (self.num_key_value_heads, -1)) for part in parts)
        if self.is_gated:
            q = self._gates_apart(q)
        return [torch.cat([q, k, v], dim=1).flatten(0, 1)]

    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        groups = tensors[0].unflatten(0, (self.num_key_value_heads, -1))
        q, k, v = groups.split([groups.shape[1] - 2 * self.head_dim, self.head_dim, self.head_dim], dim=1)
        if self.is_gated:
            q = self._gates_beside(q)
        return [part.flatten(0, 1) for part in (q, k, v)]

    def _gates_apart(self, q: Tensor) -> Tensor:
        """[K, N/K x (query, gate) x H, D] -> [K, (query, gate) x N/K x H, D]."""
        split: Tensor = q.unflatten(1, (-1, 2, self.head_dim))
        return split.transpose(1, 2).flatten(1, 3)

    def _gates_beside(self, q: Tensor) -> Tensor:
        """The inverse of `_gates_apart`."""
        split: Tensor = q.unflatten(1, (2, -1, self.head_dim))
        return split.transpose(1, 2).flatten(1, 3)


@dataclass(frozen=True)
class Vocabulary:
    """Rows of a vocabulary, [V, D], are padded with zeros to a multiple, so that Megatron can split them.

    A head that is tied to the embedding, and stored beside it all the same, is not stored twice by Megatron.
    """

    vocab_size: int
    multiple: int
    is_head_stored: bool = False

    keeps_dtype: ClassVar[bool] = True

    def to_megatron(self, parts: Sequence[Tensor]) -> list[Tensor]:
        rows = parts[0]
        if self.is_head_stored and not rows.is_meta and not torch.equal(rows, parts[1]):
            raise ModelError(
                "tensor lm_head.weight",
                "not the embedding",
                "config.json ties it to the embedding, but it is stored with other values.",
                "Set tie_word_embeddings to false in config.json if the head is meant to be its own.",
            )
        padding = -self.vocab_size % self.multiple
        return [F.pad(rows, (0, 0, 0, padding)) if padding else rows]

    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[0][: self.vocab_size]] * (1 + self.is_head_stored)


@dataclass(frozen=True)
class MinusOne:
    """A norm that scales by its weight in HF, and by 1 + weight in Megatron.

    The difference is stored in the next wider type, or going back would lose bits of weights below 1/2. That is exact
    unless a weight is below 2^-17 (bfloat16) or 2^-30 (float32).
    """

    keeps_dtype: ClassVar[bool] = False

    def to_megatron(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return [parts[0].to(_WIDER[parts[0].dtype]) - 1]

    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[0].to(_WIDER.get(tensors[0].dtype, torch.float64)) + 1]


@dataclass(frozen=True)
class DeltaProjections:
    """HF's in_proj_qkvz and in_proj_ba of the gated delta net are six tensors in Megatron's checkpoints.

    HF groups rows by key head: its query, its key, the values and then the z of its value heads; and the beta, then the
    alpha of its value heads. Megatron has all queries, all keys, and so on.
    """

    num_key_heads: int
    key_head_dim: int
    keeps_dtype: ClassVar[bool] = True

    def to_megatron(self, parts: Sequence[Tensor]) -> list[Tensor]:
        qkvz, ba = (part.unflatten(0, (self.num_key_heads, -1)) for part in parts)
        values = (qkvz.shape[1] - 2 * self.key_head_dim) // 2
        pieces = [*qkvz.split([self.key_head_dim, self.key_head_dim, values, values], dim=1), *ba.chunk(2, dim=1)]
        return [piece.flatten(0, 1) for piece in pieces]

    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        pieces = [tensor.unflatten(0, (self.num_key_heads, -1)) for tensor in tensors]
        return [torch.cat(pieces[:4], dim=1).flatten(0, 1), torch.cat(pieces[4:], dim=1).flatten(0, 1)]


@dataclass(frozen=True)
class SplitRows:
    """One HF tensor is several of Megatron's, one after the other."""

    rows: tuple[int, ...]

    keeps_dtype: ClassVar[bool] = True

    def to_megatron(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return list(parts[0].split(list(self.rows)))

    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(tensors))]
