"""The Triton kernels of `lockstep.kernels.paged_attention`. Import it only where there is a GPU.

Decoding is bound by the bytes of the cache, so these must be shared out evenly whatever the lengths are, without the
host knowing them. All tiles of all sequences stand in one line, sequence by sequence, head by head; every program takes
an equal stretch of the line. A head that lies inside one stretch is finished there. One that is cut gets partial sums,
at most two from a program, and a second kernel joins them in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lockstep.kernels.overlap_triton import begin, num_multiprocessors, overlapping

_PARTS = 32
"""Partial sums that are joined at once."""


def _settings(head_dim: int) -> dict[str, int]:
    """Tokens of a tile, programs on a multiprocessor, depth of the pipeline, warps."""
    if head_dim <= 128:
        return {"tile": 64, "per_sm": 2, "stages": 3, "warps": 4}
    return {"tile": 32, "per_sm": 2, "stages": 3, "warps": 4}


def paged_decode_triton(q_BNH: Tensor, kv_cache: Tensor, block_tables_BM: Tensor, lengths_B: Tensor) -> Tensor:
    """`paged_decode` for a contiguous cache; H a power of two."""
    return decode_with(q_BNH, kv_cache, block_tables_BM, lengths_B, **_settings(q_BNH.shape[2]))


def decode_with(
    q_BNH: Tensor,
    kv_cache: Tensor,
    block_tables_BM: Tensor,
    lengths_B: Tensor,
    *,
    tile: int,
    per_sm: int,
    stages: int,
    warps: int,
) -> Tensor:
    batch, heads, head_dim = q_BNH.shape
    _, keys, num_blocks, block_size, _ = kv_cache.shape
    assert kv_cache.is_contiguous(), "blocks of a head lie in order"
    assert block_tables_BM.stride(1) == 1, "a sequence's blocks lie in order"
    assert head_dim & (head_dim - 1) == 0, "a head's dims are a power of two"
    out_BNH = torch.empty((batch, heads, head_dim), dtype=q_BNH.dtype, device=q_BNH.device)
    if batch == 0:
        return out_BNH
    if q_BNH.stride(2) != 1:
        q_BNH = q_BNH.contiguous()
    group, programs = heads // keys, per_sm * num_multiprocessors(q_BNH.device)
    # Of every program: two partial sums, with the largest score and the sum of weights of each, and a join to do.
    sums = torch.empty((programs, 2, group, head_dim), dtype=torch.float32, device=q_BNH.device)
    stats = torch.empty((programs, 2, group, 2), dtype=torch.float32, device=q_BNH.device)
    joins = torch.empty((programs, 3), dtype=torch.int32, device=q_BNH.device)
    sizes = {"KEYS": keys, "GROUP": group, "HEAD_DIM": head_dim, **overlapping(q_BNH.device)}
    _decode_stretch[(programs,)](
        q_BNH, kv_cache, block_tables_BM, lengths_B, out_BNH, sums, stats, joins,
        batch, block_tables_BM.stride(0), num_blocks, *q_BNH.stride()[:2], head_dim**-0.5 * 1.4426950408889634,
        **sizes, ROWS=max(16, triton.next_power_of_2(group)), BLOCK_SIZE=block_size, TILE=tile,
        BATCH=max(16, triton.next_power_of_2(batch)), STAGES=stages, num_warps=warps,
    )  # fmt: skip
    _join[(programs, group)](lengths_B, out_BNH, sums, stats, joins, batch, **sizes, PARTS=_PARTS, num_warps=4)
    return out_BNH


@triton.jit  # type: ignore[untyped-decorator]
def _block_of(table, tile, length, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The block of a tile, or of every token of it. Asked for one tile ahead: a cache read waits for its answer."""
    if BLOCK_SIZE % TILE == 0:
        block = tl.load(table + tile * TILE // BLOCK_SIZE, mask=tile * TILE < length, other=0)
    else:
        position = tile * TILE + tl.arange(0, TILE)
        block = tl.load(table + position // BLOCK_SIZE, mask=position < length, other=0)
    return block


@triton.jit  # type: ignore[untyped-decorator]
def _decode_stretch(  # type: ignore[no-untyped-def]
    q_ptr, cache, tables, lengths, out, sums, stats, joins,
    batch, table_stride, num_blocks, q_stride, q_head_stride, scale,
    KEYS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, BATCH: tl.constexpr, STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    begin(OVERLAPS)
    program = tl.program_id(0)
    sequences = tl.arange(0, BATCH)
    tiles_B = tl.cdiv(tl.load(lengths + sequences, mask=sequences < batch, other=0), TILE).to(tl.int32)
    ends_B = tl.cumsum(tiles_B, 0) * KEYS
    total = tl.sum(tiles_B, 0) * KEYS
    # Of so many programs each takes `share` tiles, the first `longer` of them one more.
    programs = tl.maximum(tl.minimum(tl.num_programs(0), total), 1)
    share = total // programs
    longer = total - share * programs
    place = tl.minimum(program, programs) * share + tl.minimum(program, longer)
    last = tl.minimum(place + share + (program < longer).to(tl.int32), total)
    sequence = tl.sum((ends_B <= place).to(tl.int32), 0)
    start = tl.sum(tl.where(sequences < sequence, tiles_B, 0), 0) * KEYS

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, HEAD_DIM)
    is_head = (row < GROUP)[:, None]
    values_offset = tl.cast(num_blocks, tl.int64) * (KEYS * BLOCK_SIZE * HEAD_DIM)
    join_parts = 0
    join_sequence = 0
    join_key = 0
    while place < last:
        length = tl.load(lengths + sequence).to(tl.int32)
        tiles = tl.cdiv(length, TILE)
        within = place - start
        key = within // tl.maximum(tiles, 1)
        low = within - key * tiles
        high = tl.minimum(tiles, low + last - place)
        q_rows = tl.cast(sequence, tl.int64) * q_stride + (key * GROUP + row)[:, None] * q_head_stride
        q = tl.load(q_ptr + q_rows + dim[None, :], mask=is_head, other=0.0)
        table = tables + tl.cast(sequence, tl.int64) * table_stride
        keys = cache + key * tl.cast(num_blocks, tl.int64) * (BLOCK_SIZE * HEAD_DIM)
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        weight = tl.zeros((ROWS,), tl.float32)
        summed = tl.zeros((ROWS, HEAD_DIM), tl.float32)
        block = _block_of(table, low, length, BLOCK_SIZE, TILE)
        for tile in tl.range(low, high, num_stages=STAGES):
            position = tile * TILE + tl.arange(0, TILE)
            inside = position < length
            slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
            block = _block_of(table, tile + 1, length, BLOCK_SIZE, TILE)
            cells = keys + slot[:, None] * HEAD_DIM + dim[None, :]
            k = tl.load(cells, mask=inside[:, None], other=0.0)
            v = tl.load(cells + values_offset, mask=inside[:, None], other=0.0)
            scores = tl.where(inside[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, 1))
            probs = tl.exp2(scores - new_largest[:, None])
            rescale = tl.exp2(largest - new_largest)
            weight = weight * rescale + tl.sum(probs, 1)
            summed = tl.dot(probs.to(v.dtype), v, summed * rescale[:, None])
            largest = new_largest
        if high - low == tiles:
            out_rows = (tl.cast(sequence, tl.int64) * KEYS + key) * GROUP + row
            result = summed / weight[:, None]
            is_stored = is_head & (tiles > 0)
            tl.store(out + out_rows[:, None] * HEAD_DIM + dim[None, :], result.to(out.dtype.element_ty), mask=is_stored)
        else:
            # Second place: what the next programs go on with.
            part = ((program * 2 + (low == 0).to(tl.int32)) * GROUP + row).to(tl.int64)
            tl.store(sums + part[:, None] * HEAD_DIM + dim[None, :], summed, mask=is_head)
            tl.store(stats + part * 2, largest, mask=row < GROUP)
            tl.store(stats + part * 2 + 1, weight, mask=row < GROUP)
            if low == 0:
                # Whose stretch holds this head's last tile?
                tile = start + (key + 1) * tiles - 1
                past_longer = tile - longer * (share + 1)
                owner = tl.where(past_longer < 0, tile // (share + 1), longer + past_longer // share)
                join_parts = owner - program + 1
                join_sequence = sequence
                join_key = key
        place += high - low
        if place == start + tiles * KEYS:
            start = place
            sequence += 1
    tl.store(joins + program * 3, join_parts)
    tl.store(joins + program * 3 + 1, join_sequence)
    tl.store(joins + program * 3 + 2, join_key)


@triton.jit  # type: ignore[untyped-decorator]
def _join(  # type: ignore[no-untyped-def]
    lengths, out, sums, stats, joins, batch,
    KEYS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One query head of the key/value head that a program left unfinished at its end, from it and those after it."""
    begin(OVERLAPS)
    program, row = tl.program_id(0), tl.program_id(1)
    dim = tl.arange(0, HEAD_DIM)
    parts = tl.load(joins + program * 3)
    if parts > 0:
        largest = tl.full((), float("-inf"), tl.float32)
        weight = tl.zeros((), tl.float32)
        summed = tl.zeros((HEAD_DIM,), tl.float32)
        for first in range(0, parts, PARTS):
            number = first + tl.arange(0, PARTS)
            inside = number < parts
            part = ((program + number) * 2 + (number == 0).to(tl.int32)) * GROUP + row
            part_largest = tl.load(stats + part * 2, mask=inside, other=float("-inf"))
            part_weight = tl.load(stats + part * 2 + 1, mask=inside, other=0.0)
            cells = sums + part.to(tl.int64)[:, None] * HEAD_DIM + dim[None, :]
            part_sums = tl.load(cells, mask=inside[:, None], other=0.0)
            new_largest = tl.maximum(largest, tl.max(part_largest, 0))
            factor = tl.exp2(part_largest - new_largest)
            rescale = tl.exp2(largest - new_largest)
            weight = weight * rescale + tl.sum(part_weight * factor, 0)
            summed = summed * rescale + tl.sum(part_sums * factor[:, None], 0)
            largest = new_largest
        head = (tl.load(joins + program * 3 + 1).to(tl.int64) * KEYS + tl.load(joins + program * 3 + 2)) * GROUP + row
        tl.store(out + head * HEAD_DIM + dim, (summed / weight).to(out.dtype.element_ty))
    for sequence in range(program, batch, tl.num_programs(0)):
        if tl.load(lengths + sequence) == 0:
            for key in range(KEYS):
                head = (tl.cast(sequence, tl.int64) * KEYS + key) * GROUP + row
                tl.store(out + head * HEAD_DIM + dim, tl.zeros((HEAD_DIM,), out.dtype.element_ty))


def store_kv_triton(k_BKH: Tensor, v_BKH: Tensor, kv_cache: Tensor, slots_B: Tensor) -> None:
    """`store_kv` for a contiguous cache."""
    _launch_store(None, k_BKH, v_BKH, None, 0.0, 0.0, None, kv_cache, slots_B)


def norm_rotate_store_triton(
    q_BNH: Tensor,
    k_BKH: Tensor,
    v_BKH: Tensor,
    weights: tuple[Tensor, Tensor],
    eps: float,
    weight_offset: float,
    tables: tuple[Tensor, Tensor],
    kv_cache: Tensor,
    slots_B: Tensor,
) -> Tensor:
    """`norm_rotate_store` for a contiguous cache."""
    out_BNH = torch.empty(q_BNH.shape, dtype=q_BNH.dtype, device=q_BNH.device)
    _launch_store((q_BNH, out_BNH), k_BKH, v_BKH, weights, eps, weight_offset, tables, kv_cache, slots_B)
    return out_BNH


def _launch_store(
    queries: tuple[Tensor, Tensor] | None,
    k_BKH: Tensor,
    v_BKH: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    eps: float,
    weight_offset: float,
    tables: tuple[Tensor, Tensor] | None,
    kv_cache: Tensor,
    slots_B: Tensor,
) -> None:
    assert kv_cache.is_contiguous(), "blocks of a head lie in order"
    batch, keys, head_dim = k_BKH.shape
    if batch == 0:
        return
    q, out = queries or (k_BKH, k_BKH)
    heads = q.shape[1] if queries else 0
    q_weight, k_weight = weights or (k_BKH, k_BKH)
    cos, sin = tables or (k_BKH, k_BKH)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k_BKH, v_BKH))
    at_once = min(4, keys & -keys)
    assert heads % at_once == 0, "key/value heads divide query heads"
    _store[(batch, (heads + 2 * keys) // at_once)](
        q, k, v, out, q_weight, k_weight, cos, sin, kv_cache, slots_B, kv_cache.shape[2] * kv_cache.shape[3],
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], eps, weight_offset,
        HEADS=heads, KEYS=keys, HEAD_DIM=head_dim, BLOCK=triton.next_power_of_2(head_dim),
        TURNED=cos.shape[-1], NORMS=queries is not None, AT_ONCE=at_once, num_warps=1 if at_once < 4 else 2,
        **overlapping(kv_cache.device),
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _normed_and_turned(  # type: ignore[no-untyped-def]
    start, weight, cos, sin, token, inside, eps, weight_offset,
    HEAD_DIM: tl.constexpr, TURNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `norm_rotary_triton` computes it."""
    dim = tl.arange(0, BLOCK)[None, :]
    is_turned = dim < TURNED
    partner = tl.where(is_turned, (dim + TURNED // 2) % TURNED, dim)
    x = tl.load(start + dim, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(start + partner, mask=inside & is_turned, other=0.0).to(tl.float32)
    w = weight_offset + tl.load(weight + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
    w_other = weight_offset + tl.load(weight + partner, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
    c = tl.load(cos + token * TURNED + dim, mask=is_turned, other=1.0).to(tl.float32)
    s = tl.load(sin + token * TURNED + dim, mask=is_turned, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)[:, None]
    return (x * w * c + other * w_other * s) * scale


@triton.jit  # type: ignore[untyped-decorator]
def _store(  # type: ignore[no-untyped-def]
    q, k, v, out, q_weight, k_weight, cos, sin, cache, slots, num_slots,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, eps, weight_offset,
    HEADS: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, TURNED: tl.constexpr,
    NORMS: tl.constexpr, AT_ONCE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """A few heads of one token: queries, then keys, then values."""
    begin(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * AT_ONCE
    number = tl.arange(0, AT_ONCE)[:, None]
    dim = tl.arange(0, BLOCK)[None, :]
    inside = (number < AT_ONCE) & (dim < HEAD_DIM)
    if first < HEADS:
        head = first + number
        start = q + token * q_stride + head * q_head_stride
        x = _normed_and_turned(start, q_weight, cos, sin, token, inside, eps, weight_offset, HEAD_DIM, TURNED, BLOCK)
        tl.store(out + (token * HEADS + head) * HEAD_DIM + dim, x.to(out.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        if first < HEADS + KEYS:
            head = first - HEADS + number
            start = k + token * k_stride + head * k_head_stride
            if NORMS:
                x = _normed_and_turned(
                    start, k_weight, cos, sin, token, inside, eps, weight_offset, HEAD_DIM, TURNED, BLOCK
                )
            else:
                x = tl.load(start + dim, mask=inside)
            cells = cache + (head * num_slots + slot) * HEAD_DIM + dim
            tl.store(cells, x.to(cache.dtype.element_ty), mask=inside & (slot >= 0))
        else:
            head = first - HEADS - KEYS + number
            value = tl.load(v + token * v_stride + head * v_head_stride + dim, mask=inside)
            cells = cache + ((KEYS + head) * num_slots + slot) * HEAD_DIM + dim
            tl.store(cells, value, mask=inside & (slot >= 0))
