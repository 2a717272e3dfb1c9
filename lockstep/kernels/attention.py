"""Causal attention over packed documents; `paged_attention.py` beside it has the sampler's, over a paged cache.

T packed query tokens, S packed key tokens, N query heads, K key/value heads, H head dim, B sequences, L padded length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, cached_property
from itertools import accumulate
from typing import Any, cast

import torch
import torch.utils.deterministic
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lockstep.kernels.fused import apply, is_fused

_deterministic: Any = torch.utils.deterministic

_PADDING_ALLOWED = 1.25
"""Documents whose lengths differ by less than this factor share one padded call on CPU."""


def packed_attention_reference(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, lengths: list[int]) -> Tensor:
    """The specification: each document alone, softmax written out."""
    outputs = []
    for q, k, v in zip(q_TNH.split(lengths), k_TKH.split(lengths), v_TKH.split(lengths), strict=True):
        heads_per_key = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(heads_per_key, 1), v.repeat_interleave(heads_per_key, 1)
        scores = torch.einsum("tnh,snh->nts", q, k) / q.shape[-1] ** 0.5
        future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        outputs.append(torch.einsum("nts,snh->tnh", scores.masked_fill(future, float("-inf")).softmax(-1), v))
    return torch.cat(outputs)


class PackedAttention:
    """Attention inside documents of the given lengths; builds its index tables once for all layers."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.segments = SegmentAttention(lengths, lengths, device)
        self._lengths, self._device = lengths, device

    def __call__(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        if not any(self._lengths):
            return torch.zeros_like(q_TNH)
        if q_TNH.is_cuda and q_TNH.dtype != torch.float32:
            return self.segments(q_TNH, k_TKH, v_TKH)
        return torch.cat([bucket.attend(q_TNH, k_TKH, v_TKH) for bucket in self._buckets])[self._inverse]

    @cached_property
    def _buckets(self) -> list[_Bucket]:
        return [_Bucket(members, self._device) for members in _length_buckets(self._lengths)]

    @cached_property
    def _inverse(self) -> Tensor:
        return torch.cat([bucket.real_rows for bucket in self._buckets]).argsort()


class SegmentAttention:
    """Attention on a GPU, in 16 bits, where the queries of every document are the last of its keys.

    Both kernels behind it repeat bit for bit, forward and backward. Triton's, on a Hopper GPU, gives a token the same
    bits whatever else is in the pack, and whether its document's queries come at once or in several calls.
    """

    def __init__(self, query_lengths: Sequence[int], key_lengths: Sequence[int], device: torch.device) -> None:
        self.query_lengths, self.key_lengths, self.device = query_lengths, key_lengths, device

    def __call__(self, q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor) -> Tensor:
        if has_own_kernel(q_TNH, k_SKH, v_SKH):
            return self.with_log_sums(q_TNH, k_SKH, v_SKH)[0]
        longest = max(self.query_lengths), max(self.key_lengths)
        return varlen_attention(q_TNH, k_SKH, v_SKH, self._cu_queries, self._cu_keys, *longest)

    def with_log_sums(
        self, q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, found: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Also the log sums `[N, T]` that backward needs; see `has_own_kernel`.

        Args:
            found: what an earlier call with equal inputs returned. It is not computed again.
        """
        from lockstep.kernels.flash_attention_triton import FlashAttention

        results: tuple[Tensor, Tensor] = apply(FlashAttention, q_TNH, k_SKH, v_SKH, self._tiles, found)
        return results

    @cached_property
    def _tiles(self) -> Tiles:
        return Tiles(self.query_lengths, self.key_lengths, self.device)

    @cached_property
    def _cu_queries(self) -> Tensor:
        return _ends(self.query_lengths, self.device)

    @cached_property
    def _cu_keys(self) -> Tensor:
        return _ends(self.key_lengths, self.device)


def _ends(lengths: Sequence[int], device: torch.device) -> Tensor:
    """0, and where each of them ends."""
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)


class Tiles:
    """What each program of Triton's kernels works on, the longest first; the queries of a document are its last keys.

    Tables are int32 and made once for each number of rows that a program takes.
    """

    def __init__(self, query_lengths: Sequence[int], key_lengths: Sequence[int], device: torch.device) -> None:
        ends_of_queries, ends_of_keys = accumulate(query_lengths), accumulate(key_lengths)
        self._documents = [
            (end_query - queries, end_query, end_key - keys, end_key)
            for queries, end_query, keys, end_key in zip(
                query_lengths, ends_of_queries, key_lengths, ends_of_keys, strict=True
            )
        ]
        self._device = device
        self._tables: dict[tuple[str, int], Tensor] = {}

    def of_queries(self, size: int) -> Tensor:
        """`[tiles, 4]`: first query, end of the document's queries, its first key, keys before the first query's."""
        rows = [
            (query, end_query, first_key, end_key - end_query + query - first_key)
            for first_query, end_query, first_key, end_key in self._documents
            for query in range(first_query, end_query, size)
        ]
        return self._table(("queries", size), rows, lambda row: -row[3])

    def of_keys(self, size: int) -> Tensor:
        """`[tiles, 5]`: first key, end of the document's keys, the first query that sees it, end of the document's
        queries, and by how many keys that query comes later."""
        rows = []
        for first_query, end_query, first_key, end_key in self._documents:
            for key in range(first_key, end_key, size):
                own = end_query - (end_key - key)  # the query at this key's place; before the first one, there is none
                query = max(first_query, own)
                rows.append((key, end_key, query, end_query, query - own))
        return self._table(("keys", size), rows, lambda row: row[2] - row[3])

    def _table(
        self, name: tuple[str, int], rows: Sequence[tuple[int, ...]], order: Callable[[tuple[int, ...]], int]
    ) -> Tensor:
        if name not in self._tables:
            self._tables[name] = torch.tensor(sorted(rows, key=order), dtype=torch.int32).to(self._device)
        return self._tables[name]


def has_own_kernel(q_TNH: Tensor, *others: Tensor) -> bool:
    """Whether Triton's kernels compute attention of these: in bf16 on a Hopper GPU, for the usual head sizes."""
    return is_fused(q_TNH, *others) and q_TNH.shape[-1] in (64, 128, 256) and _is_hopper(q_TNH.device)


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def _length_buckets(lengths: list[int]) -> list[list[tuple[int, int]]]:
    """Group (start, length) of documents so that padding inside a group stays under `_PADDING_ALLOWED`."""
    starts = [0]
    for length in lengths[:-1]:
        starts.append(starts[-1] + length)
    buckets: list[list[tuple[int, int]]] = []
    for start, length in sorted(zip(starts, lengths, strict=True), key=lambda item: (-item[1], item[0])):
        if length == 0:
            continue
        if not buckets or buckets[-1][0][1] > length * _PADDING_ALLOWED:
            buckets.append([])
        buckets[-1].append((start, length))
    return buckets


class _Bucket:
    """Documents of similar length, right-padded to `[B, L]`: causality alone hides the padding from real rows."""

    def __init__(self, members: list[tuple[int, int]], device: torch.device) -> None:
        starts, lengths = torch.tensor(members).unbind(1)
        offsets = torch.arange(int(lengths.max()))
        rows_BL = starts[:, None] + offsets.minimum(lengths[:, None] - 1)
        is_real_BL = offsets < lengths[:, None]
        self.rows_BL = rows_BL.to(device)
        self.real_rows = rows_BL[is_real_BL].to(device)
        self.real_slots = is_real_BL.flatten().nonzero().squeeze(1).to(device)

    def attend(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        q, k, v = (x[self.rows_BL].transpose(1, 2) for x in (q_TNH, k_TKH, v_TKH))
        # On a GPU, SDPA's fused fp32 backward adds up in any order; the plain one repeats bit for bit.
        with sdpa_kernel(SDPBackend.MATH) if q.is_cuda else nullcontext():
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)[self.real_slots]


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor, max_queries: int, max_keys: int
) -> Tensor:
    """Flash attention over ragged documents; a document's queries are the last of its keys.

    torch 2.11 and 2.13 spell grouped queries differently. Not cuDNN's attention, which is faster on long documents of
    one length: its backward does not repeat bit for bit.
    """
    from torch.nn.attention.varlen import varlen_attn

    arguments = (q, k, v, cu_queries, cu_keys, max_queries, max_keys)
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in varlen_attn.__annotations__ else {}
    out = cast(Tensor, varlen_attn(*arguments, window_size=(-1, 0), **grouped))
    if out.grad_fn is not None:
        _repeat_bit_for_bit(out.grad_fn)
    return out


def _repeat_bit_for_bit(node: Node) -> None:
    """Let the backward of one operation add up in a fixed order: flash attention's asks only torch's global switch."""
    before = torch.are_deterministic_algorithms_enabled(), _deterministic.fill_uninitialized_memory

    def switch_on(gradients: object) -> None:
        torch.use_deterministic_algorithms(True)
        _deterministic.fill_uninitialized_memory = False

    def switch_back(gradients_in: object, gradients_out: object) -> None:
        torch.use_deterministic_algorithms(before[0])
        _deterministic.fill_uninitialized_memory = before[1]

    node.register_prehook(switch_on)
    node.register_hook(switch_back)
