"""Attention over a paged cache of keys and values, and how new ones get into it.

B sequences, Q new tokens of each, N query heads, K key/value heads, H head dim, M blocks that a sequence may have, L =
M x block size, R <= H leading dims of a head that are turned. A cache is [2, K, blocks, block size, H], keys first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.kernels.fused import is_fused, runs_triton
from lockstep.kernels.norm_rotary import norm_and_rotate


def paged_attention(q_BQNH: Tensor, kv_cache: Tensor, block_tables_BM: Tensor, bias_BQL: Tensor) -> Tensor:
    """Attention of Q new tokens per sequence over its cached keys and values, `[B, Q, N, H]`.

    `block_tables_BM` holds each sequence's blocks in order, padded with any valid block; `bias_BQL` is 0 on those of
    their L slots that a query may see (at least one) and -inf elsewhere.
    """
    batch, width = q_BQNH.shape[:2]
    _, num_keys, _, block_size, head_dim = kv_cache.shape
    length = block_tables_BM.shape[1] * block_size
    rows = kv_cache.flatten(0, 1).flatten(2).index_select(1, block_tables_BM.flatten())
    k, v = rows.view(2, num_keys * batch, length, head_dim)
    q_KBGQH = (q_BQNH * head_dim**-0.5).unflatten(2, (num_keys, -1)).permute(2, 0, 3, 1, 4)
    groups = q_KBGQH.shape[2]
    scores = torch.bmm(q_KBGQH.reshape(num_keys * batch, groups * width, head_dim), k.transpose(1, 2)).float()
    scores.view(num_keys, batch, groups, width, length).add_(bias_BQL[None, :, None])
    out = torch.bmm(scores.softmax(-1).to(v.dtype), v)
    return out.view(num_keys, batch, groups, width, head_dim).permute(1, 3, 0, 2, 4).flatten(2, 3)


def length_bias(lengths_B: Tensor, num_slots: int, dtype: torch.dtype) -> Tensor:
    """The bias `[B, 1, num_slots]` that hides slots past each length."""
    places_L = torch.arange(num_slots, dtype=torch.int32, device=lengths_B.device)
    is_hidden_B1L = (places_L >= lengths_B[:, None])[:, None]
    return torch.zeros_like(is_hidden_B1L, dtype=dtype).masked_fill_(is_hidden_B1L, float("-inf"))


def paged_decode_reference(
    q_BNH: Tensor,
    kv_cache: Tensor,
    block_tables_BM: Tensor,
    lengths_B: Tensor,
    bias_B1L: Tensor | None = None,
) -> Tensor:
    """The specification of `paged_decode`, through `paged_attention`."""
    if bias_B1L is None:
        bias_B1L = length_bias(lengths_B, block_tables_BM.shape[1] * kv_cache.shape[3], q_BNH.dtype)
    out_BNH = paged_attention(q_BNH[:, None], kv_cache, block_tables_BM, bias_B1L)[:, 0]
    # On a CPU a look is cheaper than a pass; on a GPU the host must not wait for an answer.
    if lengths_B.is_cpu and not (lengths_B == 0).any():
        return out_BNH
    return out_BNH.masked_fill(lengths_B[:, None, None] == 0, 0.0)


def paged_decode(
    q_BNH: Tensor,
    kv_cache: Tensor,
    block_tables_BM: Tensor,
    lengths_B: Tensor,
    bias_B1L: Tensor | None = None,
) -> Tensor:
    """Attention of one new token per sequence over the `lengths_B` first slots of its blocks, `[B, N, H]`.

    The new token's key and value are among them, already stored. A row of length 0 stands for no sequence and gets
    zeros. On a GPU in bf16 nothing of a cache past a sequence's length is read, entries of `block_tables_BM` past its
    blocks may be anything, the launches depend on shapes alone (a graph may hold them), and results repeat bit for
    bit. How a sequence's sum is divided depends on its neighbours, so its last bits do.

    Args:
        bias_B1L: `length_bias` of the lengths, where the layers of a step share it; only torch's version needs it.
    """
    is_power_of_two = q_BNH.shape[2] & (q_BNH.shape[2] - 1) == 0
    if is_power_of_two and is_fused(q_BNH, kv_cache):
        from lockstep.kernels.paged_attention_triton import paged_decode_triton

        return paged_decode_triton(q_BNH, kv_cache, block_tables_BM, lengths_B)
    return paged_decode_reference(q_BNH, kv_cache, block_tables_BM, lengths_B, bias_B1L)


def store_kv(k_BKH: Tensor, v_BKH: Tensor, kv_cache: Tensor, slots_B: Tensor) -> None:
    """Write one key and value per row to its slot (block x block size + place in it); a slot of -1 takes nothing."""
    if runs_triton(kv_cache):
        from lockstep.kernels.paged_attention_triton import store_kv_triton

        store_kv_triton(k_BKH, v_BKH, kv_cache, slots_B)
        return
    new_BPH = torch.cat((k_BKH, v_BKH), dim=1)
    is_skipped_B = slots_B < 0
    if is_skipped_B.any():
        new_BPH, slots_B = new_BPH[~is_skipped_B], slots_B[~is_skipped_B]
    kv_cache.flatten(2, 3).flatten(0, 1).index_copy_(1, slots_B.long(), new_BPH.transpose(0, 1))


def norm_rotate_store(
    q_BNH: Tensor,
    k_BKH: Tensor,
    v_BKH: Tensor,
    q_weight_H: Tensor,
    k_weight_H: Tensor,
    eps: float,
    weight_offset: float,
    tables: tuple[Tensor, Tensor],
    kv_cache: Tensor,
    slots_B: Tensor,
) -> Tensor:
    """`norm_and_rotate` of queries and keys, and `store_kv`, in one launch; returns the queries `[B, N, H]`.

    Heads may lie apart in memory. Rounds as the separate operations do.
    """
    if is_fused(q_BNH, k_BKH, v_BKH, q_weight_H, k_weight_H, *tables, kv_cache):
        from lockstep.kernels.paged_attention_triton import norm_rotate_store_triton

        weights = q_weight_H, k_weight_H
        return norm_rotate_store_triton(q_BNH, k_BKH, v_BKH, weights, eps, weight_offset, tables, kv_cache, slots_B)
    store_kv(norm_and_rotate(k_BKH, k_weight_H, eps, weight_offset, tables), v_BKH, kv_cache, slots_B)
    return norm_and_rotate(q_BNH, q_weight_H, eps, weight_offset, tables)
