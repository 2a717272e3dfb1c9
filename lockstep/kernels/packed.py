"""`TokenMixer` over packed documents, for training and prefill: no token sees another document."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lockstep.kernels.attention import PackedAttention
from lockstep.kernels.causal_conv import causal_conv
from lockstep.kernels.gated_delta_rule import DeltaLayout, gated_delta_rule


class PackedDocuments:
    """Documents of the given lengths, one after the other; index tables are built once for all layers."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.lengths = lengths
        self.device = device

    @cached_property
    def attention(self) -> PackedAttention:
        return PackedAttention(self.lengths, self.device)

    @cached_property
    def delta_layout(self) -> DeltaLayout:
        return DeltaLayout(self.lengths, self.device)

    def attend(self, attention_index: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        return self.attention(q_TNH, k_TKH, v_TKH)

    def convolve(self, delta_index: int, x_TC: Tensor, weight_CW: Tensor) -> Tensor:
        return causal_conv(x_TC, weight_CW, self.delta_layout)[0]

    def delta_rule(
        self, delta_index: int, q_TKH: Tensor, k_TKH: Tensor, v_TVJ: Tensor, log_decay_TV: Tensor, beta_TV: Tensor
    ) -> Tensor:
        return gated_delta_rule(q_TKH, k_TKH, v_TVJ, log_decay_TV, beta_TV, self.delta_layout)[0]
