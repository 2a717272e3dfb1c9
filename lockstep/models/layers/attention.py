"""Grouped-query attention with per-head query and key norms, plain and with an output gate.

T packed tokens, D model width, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from torch import Tensor, nn

from lockstep.kernels.norm_rotary import norm_and_rotate
from lockstep.models.layers.mixer import NormsAndAttends, TokenMixer
from lockstep.models.layers.norm import RMSNorm


class Attention(nn.Module):
    """`unflatten` infers the head count, so the same code runs on a shard of the heads.

    Args:
        norm: of queries and keys, over the head dim.
        is_gated: `q_proj` then holds a gate beside each head's query, and its sigmoid scales what the head found.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        bias: bool,
        norm: type[RMSNorm],
        norm_eps: float,
        is_gated: bool = False,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.is_gated = is_gated
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim * (2 if is_gated else 1), bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)
        self.q_norm = norm(head_dim, norm_eps)
        self.k_norm = norm(head_dim, norm_eps)

    def project(self, x_TD: Tensor) -> list[Tensor]:
        """Queries (with gates), keys and values, heads side by side."""
        return [self.q_proj(x_TD), self.k_proj(x_TD), self.v_proj(x_TD)]

    def forward(self, x_TD: Tensor, attention_index: int, rotary: tuple[Tensor, Tensor], mixer: TokenMixer) -> Tensor:
        q_TNH, k_TKH, v_TKH = self.project(x_TD)
        gate_TNH = None
        if self.is_gated:
            q_TNH, gate_TNH = q_TNH.unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, dim=-1)
        else:
            q_TNH = q_TNH.unflatten(-1, (-1, self.head_dim))
        k_TKH, v_TKH = (x.unflatten(-1, (-1, self.head_dim)) for x in (k_TKH, v_TKH))
        norms = self.q_norm, self.k_norm
        if isinstance(mixer, NormsAndAttends):
            out_TNH = mixer.norm_and_attend(attention_index, q_TNH, k_TKH, v_TKH, norms, rotary)
        else:
            q_TNH, k_TKH = (
                norm_and_rotate(x_TNH, norm.weight, norm.eps, norm.weight_offset, rotary)
                for x_TNH, norm in zip((q_TNH, k_TKH), norms, strict=True)
            )
            out_TNH = mixer.attend(attention_index, q_TNH, k_TKH, v_TKH)
        if gate_TNH is not None:
            out_TNH = out_TNH * gate_TNH.sigmoid()
        projected: Tensor = self.o_proj(out_TNH.flatten(-2))
        return projected
