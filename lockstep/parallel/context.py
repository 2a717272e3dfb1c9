"""Token mixing where the documents of a pack are spread over context-parallel ranks.

Attention gathers all keys and values and answers this rank's queries. The delta rule is a scan over tokens, so there
every rank takes all tokens of some heads (DeepSpeed-Ulysses, arXiv:2309.14509), and so does its convolution.

T rows of the pack, C rows of this rank, N query heads, K key/value heads, H head dim; of the delta rule: V value
heads, J value head dim, W taps and D channels of the convolution.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lockstep.kernels.attention import SegmentAttention
from lockstep.kernels.packed import PackedDocuments
from lockstep.parallel.collectives import all_gather_rows, all_to_all_rows
from lockstep.parallel.rows import RankRows


class ContextMixer:
    """`TokenMixer` over this rank's rows."""

    def __init__(self, rows: RankRows, group: dist.ProcessGroup) -> None:
        self.rows = rows
        self.group = group
        self.whole = PackedDocuments(rows.lengths, rows.device)

    def attend(self, attention_index: int, q_CNH: Tensor, k_CKH: Tensor, v_CKH: Tensor) -> Tensor:
        kv = all_gather_rows(torch.cat([k_CKH, v_CKH], dim=-1), self.group)[self.rows.pack_order_T]
        k_TKH, v_TKH = kv.split([k_CKH.shape[-1], v_CKH.shape[-1]], dim=-1)
        if q_CNH.is_cuda and q_CNH.dtype != torch.float32:
            return self._attend_by_varlen(q_CNH, k_TKH, v_TKH)
        return torch.cat([_attend_segment(q, k, v) for q, k, v in self._per_segment(q_CNH, k_TKH, v_TKH)])

    def convolve(self, delta_index: int, x_CD: Tensor, weight_DW: Tensor) -> Tensor:
        mine = weight_DW.chunk(self.group.size())[self.group.rank()]
        mixed_TD = self.whole.convolve(delta_index, self._to_heads(x_CD), mine)
        return self._to_rows(mixed_TD)

    def delta_rule(
        self, delta_index: int, q_CKH: Tensor, k_CKH: Tensor, v_CVJ: Tensor, log_decay_CV: Tensor, beta_CV: Tensor
    ) -> Tensor:
        inputs = [self._to_heads(x) for x in (q_CKH, k_CKH, v_CVJ, log_decay_CV, beta_CV)]
        q, k, v, log_decay, beta = inputs
        return self._to_rows(self.whole.delta_rule(delta_index, q, k, v, log_decay, beta))

    def _to_heads(self, x_CV: Tensor) -> Tensor:
        """Some rows of all heads `[C, V, ...]` to all rows of some heads `[T, V / ranks, ...]`, in the pack's order."""
        size = self.group.size()
        parts = x_CV.unflatten(1, (size, -1)).transpose(0, 1).flatten(0, 1)
        return self._exchange(parts)[self.rows.pack_order_T]

    def _to_rows(self, x_TV: Tensor) -> Tensor:
        """The inverse of `_to_heads`."""
        parts = self._exchange(x_TV[self.rows.rank_order_T]).unflatten(0, (self.group.size(), -1))
        joined: Tensor = parts.transpose(0, 1).flatten(1, 2)
        return joined

    def _exchange(self, x: Tensor) -> Tensor:
        sizes = [len(x) // self.group.size()] * self.group.size()
        return all_to_all_rows(x, sizes, sizes, self.group)

    def _per_segment(self, q_CNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        parts = []
        for segment in self.rows.segments:
            keys = slice(segment.first_key, segment.first_key + segment.num_keys)
            queries = slice(segment.first_row, segment.first_row + segment.num_rows)
            parts.append((q_CNH[queries], k_TKH[keys], v_TKH[keys]))
        return parts

    def _attend_by_varlen(self, q_CNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """The kernels align a segment's last query with its last key, and want every segment's keys in a row."""
        attention, keys = self._varlen
        return attention(q_CNH, k_TKH[keys], v_TKH[keys])

    @cached_property
    def _varlen(self) -> tuple[SegmentAttention, Tensor]:
        """Also the rows of the pack that are its keys."""
        segments, device = self.rows.segments, self.rows.device
        keys = torch.cat([torch.arange(s.first_key, s.first_key + s.num_keys) for s in segments]).to(device)
        return SegmentAttention([s.num_rows for s in segments], [s.num_keys for s in segments], device), keys


def _attend_segment(q_QNH: Tensor, k_LKH: Tensor, v_LKH: Tensor) -> Tensor:
    """The last Q of L tokens."""
    count, length = len(q_QNH), len(k_LKH)
    seen_QL = torch.ones(count, length, dtype=torch.bool, device=q_QNH.device).tril(length - count)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_QNH, k_LKH, v_LKH))
    # On a GPU, SDPA's fused fp32 backward adds up in any order; the plain one repeats bit for bit.
    with sdpa_kernel(SDPBackend.MATH) if q.is_cuda else nullcontext():
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_QL, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)
