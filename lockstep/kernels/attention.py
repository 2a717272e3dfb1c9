"""Causal attention over packed documents (training) and over a paged cache (sampling).

T packed query tokens, N query heads, K key/value heads, H head dim, B sequences, L padded length.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.utils.deterministic
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

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
        self.cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
        self.max_length = max(lengths, default=0)
        self._buckets = [_Bucket(members, device) for members in _length_buckets(lengths)]
        if self._buckets:
            self._inverse = torch.cat([bucket.real_rows for bucket in self._buckets]).argsort()

    def __call__(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        if not self._buckets:
            return torch.zeros_like(q_TNH)
        if q_TNH.is_cuda and q_TNH.dtype != torch.float32:
            lengths = self.cu_seqlens, self.cu_seqlens, self.max_length, self.max_length
            return varlen_attention(q_TNH, k_TKH, v_TKH, *lengths)
        return torch.cat([bucket.attend(q_TNH, k_TKH, v_TKH) for bucket in self._buckets])[self._inverse]


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


def paged_attention(q_BQNH: Tensor, kv_cache: Tensor, block_tables: Tensor, bias_BQL: Tensor) -> Tensor:
    """Attention of Q new tokens per sequence over its cached keys and values.

    Shapes: `kv_cache` is [2, K, blocks, block size, H], keys first; `block_tables` [B, blocks per sequence] holds each
    sequence's blocks in order, padded with any valid block; `bias_BQL` is 0 on those of their L = blocks x block size
    slots that a query may see (at least one) and -inf elsewhere. Result [B, Q, N, H].
    """
    batch, width = q_BQNH.shape[:2]
    _, num_keys, _, block_size, head_dim = kv_cache.shape
    length = block_tables.shape[1] * block_size
    rows = kv_cache.flatten(0, 1).flatten(2).index_select(1, block_tables.flatten())
    k, v = rows.view(2, num_keys * batch, length, head_dim)
    q_KBGQH = (q_BQNH * head_dim**-0.5).unflatten(2, (num_keys, -1)).permute(2, 0, 3, 1, 4)
    groups = q_KBGQH.shape[2]
    scores = torch.bmm(q_KBGQH.reshape(num_keys * batch, groups * width, head_dim), k.transpose(1, 2)).float()
    scores.view(num_keys, batch, groups, width, length).add_(bias_BQL[None, :, None])
    out = torch.bmm(scores.softmax(-1).to(v.dtype), v)
    return out.view(num_keys, batch, groups, width, head_dim).permute(1, 3, 0, 2, 4).flatten(2, 3)
