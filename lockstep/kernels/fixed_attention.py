"""Causal attention in which a token's bits depend on its own document alone, in training and over a paged cache.

Scores live in tiles of one shape, and a token's keys are met block by block from the first one on, whether its queries
come at once, in parts or one at a time. Blocks that a row does not see change nothing of it. On a Hopper GPU in bf16
these are Triton's kernels; on a CPU torch's operations, in fp32.

T packed query tokens, S packed key tokens, N query heads, K key/value heads, H head dim, M tiles, Q queries and B keys
of a tile, G = N / K; of a paged cache as in `paged_attention.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lockstep.kernels.attention import PackedAttention, SegmentAttention, has_own_kernel
from lockstep.kernels.fused import apply

ROWS, KEYS = 16, 64
"""Rows of a tile on a CPU, queries times the heads that share a key; and keys that it meets at once."""

_MOST_NUMBERS = 2**22
"""Of the scores of tiles that are computed together."""


class FixedAttention:
    """Attention where the queries of every document are the last of its keys."""

    def __init__(self, query_lengths: Sequence[int], key_lengths: Sequence[int], device: torch.device) -> None:
        self.segments = SegmentAttention(query_lengths, key_lengths, device)

    def __call__(self, q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor) -> Tensor:
        if q_TNH.is_cuda:
            assert has_own_kernel(q_TNH, k_SKH, v_SKH), "what no kernel computes was refused before"
            return self.segments(q_TNH, k_SKH, v_SKH)
        lengths = list(self.segments.query_lengths), list(self.segments.key_lengths)
        out_TNH: Tensor = apply(_FixedAttention, q_TNH, k_SKH, v_SKH, *lengths)
        return out_TNH


def fixed_paged_decode(q_BNH: Tensor, kv_cache: Tensor, block_tables_BM: Tensor, lengths_B: Tensor) -> Tensor:
    """As `paged_decode`, with the bits that `FixedAttention` gives the same token."""
    if has_own_kernel(q_BNH, kv_cache):
        from lockstep.kernels.fixed_attention_triton import paged_decode_in_order

        return paged_decode_in_order(q_BNH, kv_cache, block_tables_BM, lengths_B)
    out_BNH = torch.zeros_like(q_BNH)
    rows = lengths_B.nonzero().squeeze(1)
    lengths, block_size = lengths_B[rows].tolist(), kv_cache.shape[3]
    if not lengths:
        return out_BNH
    slots = [
        (table[:, None] * block_size + torch.arange(block_size)).flatten()[:length]
        for table, length in zip(block_tables_BM[rows].long(), lengths, strict=True)
    ]
    k_SKH, v_SKH = cached_rows(kv_cache, torch.cat(slots))
    out_BNH[rows] = FixedAttention([1] * len(lengths), lengths, q_BNH.device)(q_BNH[rows], k_SKH, v_SKH)
    return out_BNH


def cached_rows(kv_cache: Tensor, slots_S: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values `[S, K, H]` of a cache's slots."""
    k_SKH, v_SKH = kv_cache.flatten(2, 3).index_select(2, slots_S).transpose(1, 2)
    return k_SKH, v_SKH


class _FixedAttention(torch.autograd.Function):
    """Backward is that of `PackedAttention`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, query_lengths: list[int], key_lengths: list[int]) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.lengths = query_lengths, key_lengths
        out = torch.zeros_like(q)
        for tiles in _tiles(query_lengths, key_lengths, q.shape[1], q.shape[2], k.shape[1]):
            tiles.attend(q, k, v, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query_lengths, key_lengths = ctx.lengths
        assert query_lengths == key_lengths, "only whole documents are trained on"
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            out = PackedAttention(query_lengths, grad_out.device)(*inputs)
            return *torch.autograd.grad(out, inputs, grad_out), None, None


class _Tiles:
    """Tiles that are computed together, those with most keys first.

    Args:
        rows: for each tile its first query, how many it has, their document's first key, and the place of the first
            query among the document's keys.
    """

    def __init__(self, rows: list[tuple[int, int, int, int]], queries: int) -> None:
        first_M, count_M, self.first_key_M, place_M = torch.tensor(rows).unbind(1)
        offsets_Q = torch.arange(queries)
        self.is_real_MQ = offsets_Q < count_M[:, None]
        self.queries_MQ = torch.where(self.is_real_MQ, first_M[:, None] + offsets_Q, first_M[:, None])
        self.places_MQ = place_M[:, None] + offsets_Q
        self.num_keys_M = place_M + count_M

    def attend(self, q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, out_TNH: Tensor) -> None:
        (num_heads, head_dim), num_keys = q_TNH.shape[1:], k_SKH.shape[1]
        count, queries, group = *self.queries_MQ.shape, num_heads // num_keys
        q_MQKGH = q_TNH[self.queries_MQ].float().unflatten(2, (num_keys, group)) * head_dim**-0.5
        rows = q_MQKGH.transpose(1, 2).reshape(count * num_keys, queries * group, head_dim)
        places_MQG = self.places_MQ.repeat_interleave(group, 1)
        highest = rows.new_full((*rows.shape[:2], 1), float("-inf"))
        total, found = torch.zeros_like(highest), torch.zeros_like(rows)
        for start in range(0, int(self.num_keys_M[0]), KEYS):
            active = int((self.num_keys_M > start).sum())
            some = slice(active * num_keys)
            keys_B = start + torch.arange(KEYS)
            at_MB = self.first_key_M[:active, None] + keys_B.minimum(self.num_keys_M[:active, None] - 1)
            k, v = (x[at_MB].float().transpose(1, 2).reshape(-1, KEYS, head_dim) for x in (k_SKH, v_SKH))
            is_hidden = keys_B > places_MQG[:active, :, None]
            scores = torch.bmm(rows[some], k.transpose(1, 2))
            scores.unflatten(0, (active, num_keys)).masked_fill_(is_hidden[:, None], float("-inf"))
            higher = torch.maximum(highest[some], scores.amax(-1, keepdim=True))
            weights = torch.exp(scores - higher)
            shrink = torch.exp(highest[some] - higher)
            total[some] = total[some] * shrink + weights.sum(-1, keepdim=True)
            found[some] = found[some] * shrink + torch.bmm(weights, v)
            highest[some] = higher
        out = (found / total).view(count, num_keys, queries, group, head_dim).transpose(1, 2).flatten(2, 3)
        out_TNH[self.queries_MQ[self.is_real_MQ]] = out[self.is_real_MQ].to(out_TNH.dtype)


def _tiles(
    query_lengths: list[int], key_lengths: list[int], num_heads: int, head_dim: int, num_keys: int
) -> Iterator[_Tiles]:
    queries = max(1, ROWS * num_keys // num_heads)
    rows = []
    ends = zip(accumulate(query_lengths), accumulate(key_lengths), strict=True)
    for (end_query, end_key), count, length in zip(ends, query_lengths, key_lengths, strict=True):
        for start in range(0, count, queries):
            first_query = end_query - count + start
            rows.append((first_query, min(queries, count - start), end_key - length, length - count + start))
    rows.sort(key=lambda row: -row[3] - row[1])
    together = max(1, _MOST_NUMBERS // (num_keys * KEYS * max(head_dim, queries * num_heads // num_keys)))
    for first in range(0, len(rows), together):
        yield _Tiles(rows[first : first + together], queries)
