"""Grouped-query attention with per-head query and key norms.

T packed tokens, D model width, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from lockstep.models.layers.norm import RMSNorm
from lockstep.models.layers.rotary import rotate


class Attend(Protocol):
    """Causal attention inside each document; the seam where trainer, paged cache and context parallel differ."""

    def __call__(self, layer_index: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Attended values `[T, N, H]`."""
        ...


class Attention(nn.Module):
    """Qwen3's attention; `unflatten` infers the head count, so the same code runs on a shard of the heads."""

    def __init__(
        self, hidden_size: int, num_heads: int, num_key_value_heads: int, head_dim: int, *, bias: bool, norm_eps: float
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)
        self.q_norm = RMSNorm(head_dim, norm_eps)
        self.k_norm = RMSNorm(head_dim, norm_eps)

    def forward(self, x_TD: Tensor, layer_index: int, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        q_TNH = self.q_norm(self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim)))
        k_TKH = self.k_norm(self.k_proj(x_TD).unflatten(-1, (-1, self.head_dim)))
        v_TKH = self.v_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        attended_TNH = attend(layer_index, rotate(q_TNH, rotary), rotate(k_TKH, rotary), v_TKH)
        projected: Tensor = self.o_proj(attended_TNH.flatten(-2))
        return projected
