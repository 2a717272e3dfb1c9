"""The Triton kernels of packed causal attention on a Hopper GPU. Import it only where there is one.

Scores live in tiles only (FlashAttention, arXiv:2205.14135). Every sum has one order that depends on a token's place in
its own document alone: results repeat bit for bit, and do not depend on what else is in the pack. For that, backward is
two kernels: one owns queries and one owns keys, and each computes the scores it needs again. A third of the products
is computed twice; nothing is added up by several programs.

T packed query tokens, S packed key tokens, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from lockstep.kernels.attention import Tiles

_LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class _Shape:
    """Of one kernel: rows of queries and of keys that a program works on at once, and how it is compiled."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


_FORWARD = {64: _Shape(64, 64, 4, 3), 128: _Shape(64, 64, 4, 3), 256: _Shape(128, 64, 8, 2)}
_OF_QUERIES = {64: _Shape(64, 64, 4, 3), 128: _Shape(128, 64, 8, 3), 256: _Shape(128, 32, 8, 2)}
_OF_KEYS = {64: _Shape(64, 64, 4, 2), 128: _Shape(64, 64, 4, 2), 256: _Shape(64, 64, 8, 2)}


class FlashAttention(torch.autograd.Function):
    """Output `[T, N, H]` and the scores' log sums `[N, T]`, to base 2, of `[T, N, H]`, `[S, K, H]` and `[S, K, H]`.

    Args:
        found: both results, where an earlier pass over the same inputs has computed them.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, found: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (_rows(x) for x in (q, k, v))
        out, log_sums = found or _forward(q, k, v, tiles)
        ctx.save_for_backward(q, k, v, out, log_sums)
        ctx.tiles = tiles
        ctx.mark_non_differentiable(log_sums)
        ctx.set_materialize_grads(False)
        return out, log_sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sums = ctx.saved_tensors
        d_out = _rows(d_out)
        d_q, deltas = _gradient_of_queries(q, k, v, out, log_sums, d_out, ctx.tiles)
        d_k, d_v = _gradients_of_keys(q, k, v, log_sums, deltas, d_out, ctx.tiles)
        return d_q, d_k, d_v, None, None


def _rows(x: Tensor) -> Tensor:
    """Contiguous, and aligned as the copy engine wants it."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _forward(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    tokens, heads, head_dim = q.shape
    shape = _FORWARD[head_dim]
    out, log_sums = torch.empty_like(q), q.new_empty(heads, tokens, dtype=torch.float32)
    table = tiles.of_queries(shape.queries)
    _attend[(heads, len(table))](
        _tiled(q, shape.queries), _tiled(k, shape.keys), _tiled(v, shape.keys), out, log_sums, table,
        tokens, _LOG2E * head_dim**-0.5, **_sizes(q, k, shape),
    )  # fmt: skip
    return out, log_sums


def _gradient_of_queries(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, d_out: Tensor, tiles: Tiles
) -> tuple[Tensor, Tensor]:
    """Also the deltas `[N, T]` that the gradients of keys need: each output's product with its gradient."""
    tokens, heads, head_dim = q.shape
    shape, scale = _OF_QUERIES[head_dim], head_dim**-0.5
    d_q, deltas, table = torch.empty_like(q), torch.empty_like(log_sums), tiles.of_queries(shape.queries)
    _query_gradients[(heads, len(table))](
        *(_tiled(x, shape.queries) for x in (q, out, d_out)), *(_tiled(x, shape.keys) for x in (k, v)),
        log_sums, deltas, d_q, table, tokens, scale, _LOG2E * scale, **_sizes(q, k, shape),
    )  # fmt: skip
    return d_q, deltas


def _gradients_of_keys(
    q: Tensor, k: Tensor, v: Tensor, log_sums: Tensor, deltas: Tensor, d_out: Tensor, tiles: Tiles
) -> tuple[Tensor, Tensor]:
    tokens, _, head_dim = q.shape
    shape, scale = _OF_KEYS[head_dim], head_dim**-0.5
    d_k, d_v, table = torch.empty_like(k), torch.empty_like(v), tiles.of_keys(shape.keys)
    _key_gradients[(k.shape[1], len(table))](
        *(_tiled(x, shape.queries) for x in (q, d_out)), *(_tiled(x, shape.keys) for x in (k, v)),
        log_sums, deltas, d_k, d_v, table, tokens, scale, _LOG2E * scale, **_sizes(q, k, shape),
    )  # fmt: skip
    return d_k, d_v


def _tiled(x: Tensor, rows: int) -> TensorDescriptor:
    """For the copy engine: rows of one head. What lies past the last token reads as zeros."""
    return TensorDescriptor.from_tensor(x.flatten(1), [rows, x.shape[2]])


def _sizes(q: Tensor, k: Tensor, shape: _Shape) -> dict[str, int]:
    return {
        "GROUP": q.shape[1] // k.shape[1], "HEADS": q.shape[1], "HEAD_DIM": q.shape[2],
        "QUERIES": shape.queries, "KEYS": shape.keys, "num_warps": shape.num_warps, "num_stages": shape.num_stages,
    }  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    q_tiles, k_tiles, v_tiles, out, log_sums, table, num_tokens, scale_log2,
    GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    entry = table + tl.program_id(1) * 4
    first_query, end_query = tl.load(entry), tl.load(entry + 1)
    first_key, position = tl.load(entry + 2), tl.load(entry + 3)
    column, key_column = head * HEAD_DIM, head // GROUP * HEAD_DIM
    query = tl.arange(0, QUERIES)
    q = q_tiles.load([first_query, column])
    highest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    found = tl.zeros((QUERIES, HEAD_DIM), tl.float32)
    seen_by_all = (position + 1) // KEYS * KEYS
    for start in tl.range(0, seen_by_all, KEYS):
        k = k_tiles.load([first_key + start, key_column])
        scores = tl.dot(q, k.T)
        higher = tl.maximum(highest, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(tl.fma(scores, scale_log2, -higher[:, None]))
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        found = found * shrink[:, None]
        v = v_tiles.load([first_key + start, key_column])
        found = tl.dot(weights.to(v.dtype), v, found)
        highest = higher
    for start in tl.range(seen_by_all, position + tl.minimum(QUERIES, end_query - first_query), KEYS):
        k = k_tiles.load([first_key + start, key_column])
        key = start + tl.arange(0, KEYS)
        scores = tl.where(key[None, :] <= position + query[:, None], tl.dot(q, k.T), float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(tl.fma(scores, scale_log2, -higher[:, None]))
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        found = found * shrink[:, None]
        v = v_tiles.load([first_key + start, key_column])
        found = tl.dot(weights.to(v.dtype), v, found)
        highest = higher
    row = first_query + query
    tl.store(log_sums + head * num_tokens + row, highest + tl.log2(total), mask=row < end_query)
    at = row[:, None].to(tl.int64) * (HEADS * HEAD_DIM) + column + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(out + at, (found / total[:, None]).to(out.dtype.element_ty), mask=row[:, None] < end_query)


@triton.jit  # type: ignore[untyped-decorator]
def _query_gradients(  # type: ignore[no-untyped-def]
    q_tiles, out_tiles, d_out_tiles, k_tiles, v_tiles, log_sums, deltas, d_q, table, num_tokens, scale, scale_log2,
    GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    entry = table + tl.program_id(1) * 4
    first_query, end_query = tl.load(entry), tl.load(entry + 1)
    first_key, position = tl.load(entry + 2), tl.load(entry + 3)
    column, key_column = head * HEAD_DIM, head // GROUP * HEAD_DIM
    query = tl.arange(0, QUERIES)
    row = first_query + query
    is_real = row < end_query
    d_out = d_out_tiles.load([first_query, column])
    delta = tl.sum(out_tiles.load([first_query, column]).to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(deltas + head * num_tokens + row, delta, mask=is_real)
    q = q_tiles.load([first_query, column])
    log_sum = tl.load(log_sums + head * num_tokens + row, mask=is_real, other=float("inf"))
    d_query = tl.zeros((QUERIES, HEAD_DIM), tl.float32)
    seen_by_all = (position + 1) // KEYS * KEYS
    for start in tl.range(0, seen_by_all, KEYS):
        k = k_tiles.load([first_key + start, key_column])
        v = v_tiles.load([first_key + start, key_column])
        weights = tl.exp2(tl.dot(q, k.T) * scale_log2 - log_sum[:, None])
        d_scores = weights * (tl.dot(d_out, v.T) - delta[:, None])
        d_query = tl.dot(d_scores.to(k.dtype), k, d_query)
    for start in tl.range(seen_by_all, position + tl.minimum(QUERIES, end_query - first_query), KEYS):
        k = k_tiles.load([first_key + start, key_column])
        v = v_tiles.load([first_key + start, key_column])
        key = start + tl.arange(0, KEYS)
        weights = tl.exp2(tl.dot(q, k.T) * scale_log2 - log_sum[:, None])
        weights = tl.where(key[None, :] <= position + query[:, None], weights, 0.0)
        d_scores = weights * (tl.dot(d_out, v.T) - delta[:, None])
        d_query = tl.dot(d_scores.to(k.dtype), k, d_query)
    at = row[:, None].to(tl.int64) * (HEADS * HEAD_DIM) + column + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(d_q + at, (d_query * scale).to(d_q.dtype.element_ty), mask=is_real[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _key_gradients(  # type: ignore[no-untyped-def]
    q_tiles, d_out_tiles, k_tiles, v_tiles, log_sums, deltas, d_k, d_v, table, num_tokens, scale, scale_log2,
    GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    key_head = tl.program_id(0)
    entry = table + tl.program_id(1) * 5
    first_key, end_key = tl.load(entry), tl.load(entry + 1)
    first_query, end_query, behind = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
    key = tl.arange(0, KEYS)
    query = tl.arange(0, QUERIES)
    k = k_tiles.load([first_key, key_head * HEAD_DIM])
    v = v_tiles.load([first_key, key_head * HEAD_DIM])
    d_key = tl.zeros((KEYS, HEAD_DIM), tl.float32)
    d_value = tl.zeros((KEYS, HEAD_DIM), tl.float32)
    # First the blocks in which not every query sees every key, then the others; in each, head after head.
    num_blocks = tl.cdiv(end_query - first_query, QUERIES)
    num_partial = tl.minimum(num_blocks, tl.cdiv(tl.maximum(0, KEYS - 1 - behind), QUERIES))
    for step in tl.range(0, GROUP * num_partial):
        head = key_head * GROUP + step // num_partial
        start = first_query + step % num_partial * QUERIES
        row = start + query
        q = q_tiles.load([start, head * HEAD_DIM])
        d_out = d_out_tiles.load([start, head * HEAD_DIM])
        log_sum = tl.load(log_sums + head * num_tokens + row, mask=row < end_query, other=float("inf"))
        delta = tl.load(deltas + head * num_tokens + row, mask=row < end_query, other=0.0)
        weights = tl.exp2(tl.dot(k, q.T) * scale_log2 - log_sum[None, :])
        weights = tl.where(key[:, None] <= behind + (row - first_query)[None, :], weights, 0.0)
        d_value = tl.dot(weights.to(d_out.dtype), d_out, d_value)
        d_scores = weights * (tl.dot(v, d_out.T) - delta[None, :])
        d_key = tl.dot(d_scores.to(q.dtype), q, d_key)
    num_full = num_blocks - num_partial
    for step in tl.range(0, GROUP * num_full):
        head = key_head * GROUP + step // num_full
        start = first_query + (num_partial + step % num_full) * QUERIES
        row = start + query
        q = q_tiles.load([start, head * HEAD_DIM])
        d_out = d_out_tiles.load([start, head * HEAD_DIM])
        log_sum = tl.load(log_sums + head * num_tokens + row, mask=row < end_query, other=float("inf"))
        delta = tl.load(deltas + head * num_tokens + row, mask=row < end_query, other=0.0)
        weights = tl.exp2(tl.dot(k, q.T) * scale_log2 - log_sum[None, :])
        d_value = tl.dot(weights.to(d_out.dtype), d_out, d_value)
        d_scores = weights * (tl.dot(v, d_out.T) - delta[None, :])
        d_key = tl.dot(d_scores.to(q.dtype), q, d_key)
    row = first_key + key
    width = tl.num_programs(0) * HEAD_DIM
    at = row[:, None].to(tl.int64) * width + key_head * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(d_k + at, (d_key * scale).to(d_k.dtype.element_ty), mask=row[:, None] < end_key)
    tl.store(d_v + at, d_value.to(d_v.dtype.element_ty), mask=row[:, None] < end_key)
