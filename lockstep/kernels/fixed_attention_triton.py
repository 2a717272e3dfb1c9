"""The Triton kernel of `lockstep.kernels.fixed_attention`: decoding over a paged cache. Import it only on a GPU.

It repeats what the forward kernel of `flash_attention_triton.py` does to a row: the same tile, the same blocks of keys
in the same order, the same instructions. The heads that share a key take the place of queries in the tile, and the sum
over the context is never divided between programs.

B sequences, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lockstep.kernels.flash_attention_triton import _FORWARD, _LOG2E


def paged_decode_in_order(q_BNH: Tensor, kv_cache: Tensor, block_tables_BM: Tensor, lengths_B: Tensor) -> Tensor:
    """One new token per sequence over the `lengths_B` first slots of its blocks; a length of 0 gets zeros."""
    q_BNH = q_BNH.contiguous()
    batch, heads, head_dim = q_BNH.shape
    _, keys, num_blocks, block_size, _ = kv_cache.shape
    shape = _FORWARD[head_dim]
    assert heads // keys <= shape.queries, "the heads of a key fit into a tile"
    assert kv_cache.is_contiguous(), "blocks of a head lie in order"
    assert block_tables_BM.stride(1) == 1, "a sequence's blocks lie in order"
    out_BNH = torch.empty_like(q_BNH)
    if batch:
        _decode[(keys, batch)](
            q_BNH, kv_cache, block_tables_BM, lengths_B, out_BNH, block_tables_BM.stride(0), num_blocks * block_size,
            _LOG2E * head_dim**-0.5, GROUP=heads // keys, HEADS=heads, NUM_KEYS=keys, HEAD_DIM=head_dim,
            BLOCK_SIZE=block_size, ROWS=shape.queries, KEYS=shape.keys,
            num_warps=shape.num_warps, num_stages=shape.num_stages,
        )  # fmt: skip
    return out_BNH


@triton.jit(do_not_specialize=["table_stride", "num_slots"])  # type: ignore[untyped-decorator]
def _decode(  # type: ignore[no-untyped-def]
    q, cache, tables, lengths, out, table_stride, num_slots, scale_log2,
    GROUP: tl.constexpr, HEADS: tl.constexpr, NUM_KEYS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    key_head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + sequence)
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, HEAD_DIM)
    at = (sequence * HEADS + key_head * GROUP + row[:, None]) * HEAD_DIM + dim[None, :]
    is_real = row[:, None] < GROUP
    tile = tl.load(q + at, mask=is_real, other=0.0)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    keys = cache + key_head.to(tl.int64) * num_slots * HEAD_DIM
    values = keys + NUM_KEYS * num_slots.to(tl.int64) * HEAD_DIM
    for start in tl.range(0, length, KEYS):
        key = start + tl.arange(0, KEYS)
        is_seen = key < length
        block = tl.load(tables + sequence * table_stride + key // BLOCK_SIZE, mask=is_seen, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE
        places = slot[:, None] * HEAD_DIM + dim[None, :]
        k = tl.load(keys + places, mask=is_seen[:, None], other=0.0)
        scores = tl.where(is_seen[None, :], tl.dot(tile, k.T), float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(tl.fma(scores, scale_log2, -higher[:, None]))
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        found = found * shrink[:, None]
        v = tl.load(values + places, mask=is_seen[:, None], other=0.0)
        found = tl.dot(weights.to(v.dtype), v, found)
        highest = higher
    result = tl.where(length > 0, found / total[:, None], 0.0)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=is_real)
