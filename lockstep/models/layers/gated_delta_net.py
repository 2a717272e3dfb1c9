"""The gated delta net (arXiv:2412.06464) as Qwen3-Next has it: a layer whose memory is one matrix per head.

T packed tokens, D model width, K key heads, V = K * r value heads, H and J their head dims, C = 2 K H + V J channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lockstep.models.layers.mixer import TokenMixer
from lockstep.models.layers.norm import GatedRMSNorm


class ConvWeight(nn.Module):
    """Taps of the depthwise convolution, `[C, 1, W]` as in HF's `conv1d.weight`."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        nn.init.normal_(self.weight, std=taps**-0.5)


class GatedDeltaNet(nn.Module):
    """Projections are grouped by key head, `[K, q | k | r values | r gates]`: a shard of the key heads is a slice."""

    def __init__(
        self,
        hidden_size: int,
        num_key_heads: int,
        num_value_heads: int,
        key_head_dim: int,
        value_head_dim: int,
        conv_taps: int,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.key_head_dim, self.value_head_dim = key_head_dim, value_head_dim
        self.values_per_key = num_value_heads // num_key_heads
        key_width, value_width = num_key_heads * key_head_dim, num_value_heads * value_head_dim
        self.in_proj_qkvz = nn.Linear(hidden_size, 2 * key_width + 2 * value_width, bias=False)
        self.in_proj_ba = nn.Linear(hidden_size, 2 * num_value_heads, bias=False)
        self.conv1d = ConvWeight(2 * key_width + value_width, conv_taps)
        self.dt_bias = nn.Parameter(torch.ones(num_value_heads))
        self.A_log = nn.Parameter(torch.zeros(num_value_heads))
        self.norm = GatedRMSNorm(value_head_dim, norm_eps)
        self.out_proj = nn.Linear(value_width, hidden_size, bias=False)

    def forward(self, x_TD: Tensor, delta_index: int, mixer: TokenMixer) -> Tensor:
        key_dim, values_dim = self.key_head_dim, self.values_per_key * self.value_head_dim
        grouped = self.in_proj_qkvz(x_TD).unflatten(-1, (-1, 2 * key_dim + 2 * values_dim))
        *qkv, gate = grouped.split((key_dim, key_dim, values_dim, values_dim), dim=-1)
        beta, dt = self.in_proj_ba(x_TD).unflatten(-1, (-1, 2 * self.values_per_key)).chunk(2, dim=-1)
        channels = [part.flatten(1) for part in qkv]
        mixed_TC = mixer.convolve(delta_index, torch.cat(channels, dim=-1), self.conv1d.weight.squeeze(1))
        q, k, v = mixed_TC.split([part.shape[1] for part in channels], dim=-1)
        out_TVJ = mixer.delta_rule(
            delta_index,
            q.unflatten(-1, (-1, key_dim)),
            k.unflatten(-1, (-1, key_dim)),
            v.unflatten(-1, (-1, self.value_head_dim)),
            -self.A_log.float().exp() * F.softplus(dt.flatten(1).float() + self.dt_bias.float()),
            beta.flatten(1).float().sigmoid(),
        )
        normed_TVJ = self.norm(out_TVJ, gate.unflatten(-1, (-1, self.value_head_dim)).flatten(1, 2))
        projected: Tensor = self.out_proj(normed_TVJ.flatten(1))
        return projected
