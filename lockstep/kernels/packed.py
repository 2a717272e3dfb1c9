"""`TokenMixer` over packed documents, for training and prefill: no token sees another document."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lockstep.kernels.attention import PackedAttention, has_own_kernel
from lockstep.kernels.causal_conv import causal_conv
from lockstep.kernels.gated_delta_rule import DeltaLayout, gated_delta_rule


class PackedDocuments:
    """Documents of the given lengths, one after the other; index tables are built once for all layers.

    Args:
        keeps_attention: for layers that are computed again in backward: the first of each pair of passes keeps what
            attention found, `T N H` numbers of the weights' type and `N T` in fp32 a layer, the second takes it. Only
            where Triton's kernels compute attention; elsewhere it is computed again.
    """

    def __init__(self, lengths: list[int], device: torch.device, *, keeps_attention: bool = False) -> None:
        self.lengths = lengths
        self.device = device
        self._keeps_attention = keeps_attention
        self._found: dict[int, tuple[Tensor, Tensor]] = {}

    @cached_property
    def attention(self) -> PackedAttention:
        return PackedAttention(self.lengths, self.device)

    @cached_property
    def delta_layout(self) -> DeltaLayout:
        return DeltaLayout(self.lengths, self.device)

    def attend(self, attention_index: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        if not self._keeps_attention or not has_own_kernel(q_TNH, k_TKH, v_TKH):
            return self.attention(q_TNH, k_TKH, v_TKH)
        found = self._found.pop(attention_index, None)
        out_TNH, log_sums_NT = self.attention.segments.with_log_sums(q_TNH, k_TKH, v_TKH, found)
        if found is None:
            self._found[attention_index] = out_TNH.detach(), log_sums_NT
        return out_TNH

    def convolve(self, delta_index: int, x_TC: Tensor, weight_CW: Tensor) -> Tensor:
        return causal_conv(x_TC, weight_CW, self.delta_layout)[0]

    def delta_rule(
        self, delta_index: int, q_TKH: Tensor, k_TKH: Tensor, v_TVJ: Tensor, log_decay_TV: Tensor, beta_TV: Tensor
    ) -> Tensor:
        return gated_delta_rule(q_TKH, k_TKH, v_TVJ, log_decay_TV, beta_TV, self.delta_layout)[0]
