"""Sparse mixture of experts: a router chooses `top_k` of E gated MLPs for each token.

T packed tokens, D model width, E experts, I expert width, S = top_k slots per token.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from lockstep.kernels.experts import grouped_experts
from lockstep.kernels.route import route
from lockstep.kernels.top_k import top_k as top_k_of_all
from lockstep.models.layers.mlp import GatedMLP


class ChooseExperts(Protocol):
    """Which experts serve each token; the seam for recording and replaying routes."""

    def __call__(self, moe_index: int, probs_TE: Tensor, top_k: int) -> Tensor:
        """Expert ids `[T, S]`; `moe_index` counts the sparse layers from 0."""
        ...


class ComputeExperts(Protocol):
    """What the chosen experts add up to, `[T, D]`; the seam for experts that live elsewhere."""

    def __call__(
        self, x_TD: Tensor, experts_TS: Tensor, weights_TS: Tensor, gate_up_EJD: Tensor, down_EDI: Tensor
    ) -> Tensor: ...


def top_k_experts(moe_index: int, probs_TE: Tensor, top_k: int) -> Tensor:
    """The router's own choice."""
    return top_k_of_all(probs_TE, top_k)


class RecordRoutes:
    """What `choose` decides (the router itself, if nothing else) is kept in `layers`, `[T, S]` per sparse layer."""

    def __init__(self, choose: ChooseExperts = top_k_experts) -> None:
        self.choose = choose
        self.layers: list[Tensor] = []

    def __call__(self, moe_index: int, probs_TE: Tensor, top_k: int) -> Tensor:
        chosen_TS = self.choose(moe_index, probs_TE, top_k)
        self.layers.append(chosen_TS)
        return chosen_TS

    def stacked(self) -> Tensor:
        """`[T, sparse layers, S]`."""
        return torch.stack(self.layers, dim=1)


class RecordRoutesAtOnce(RecordRoutes):
    """The same for the router's own choice, taken together with the weights in one launch, without gradients. Weights
    may differ from those of the separate operations in the last bit."""

    def __init__(self) -> None:
        super().__init__()


class Router(nn.Module):
    """Linear router; `weight` is HF's `mlp.gate.weight`."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        nn.init.normal_(self.weight, std=0.02)

    def logits(self, x_TD: Tensor) -> Tensor:
        return nn.functional.linear(x_TD, self.weight)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.logits(x_TD).softmax(dim=-1, dtype=torch.float32)


class Experts(nn.Module):
    """All experts of a layer, stacked: `gate_up_proj` [E, 2 I, D] and `down_proj` [E, D, I]."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.compute: ComputeExperts = grouped_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        nn.init.normal_(self.gate_up_proj, std=0.02)
        nn.init.normal_(self.down_proj, std=0.02)

    def forward(self, x_TD: Tensor, experts_TS: Tensor, weights_TS: Tensor) -> Tensor:
        return self.compute(x_TD, experts_TS, weights_TS, self.gate_up_proj, self.down_proj)


class MoE(nn.Module):
    """Qwen3-MoE's feed-forward layer: softmax over all experts, then top-k, then (usually) renormalise.

    Args:
        shared_expert_size: width of an expert that serves every token, scaled by a sigmoid gate
            (Qwen3-Next); 0 is none.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        norm_topk_prob: bool,
        shared_expert_size: int = 0,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.norm_topk_prob = norm_topk_prob
        self.gate = Router(hidden_size, num_experts)
        self.experts = Experts(num_experts, hidden_size, intermediate_size)
        self.has_shared_expert = shared_expert_size > 0
        if self.has_shared_expert:
            self.shared_expert = GatedMLP(hidden_size, shared_expert_size)
            self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, x_TD: Tensor, moe_index: int, choose_experts: ChooseExperts) -> Tensor:
        experts_TS, weights_TS = self._route(x_TD, moe_index, choose_experts)
        # Last what backward needs nothing from: recomputing ends before the experts' second product.
        shared_TD = None
        if self.has_shared_expert:
            shared_TD = self.shared_expert_gate(x_TD).sigmoid() * self.shared_expert(x_TD)
        mixed_TD: Tensor = self.experts(x_TD, experts_TS, weights_TS)
        return mixed_TD if shared_TD is None else mixed_TD + shared_TD

    def _route(self, x_TD: Tensor, moe_index: int, choose_experts: ChooseExperts) -> tuple[Tensor, Tensor]:
        """Expert ids and weights `[T, S]`."""
        if isinstance(choose_experts, RecordRoutesAtOnce):
            experts_TS, weights_TS = route(self.gate.logits(x_TD), self.top_k, renormalises=self.norm_topk_prob)
            choose_experts.layers.append(experts_TS)
            return experts_TS, weights_TS
        probs_TE = self.gate(x_TD)
        experts_TS = choose_experts(moe_index, probs_TE, self.top_k)
        weights_TS = probs_TE.gather(-1, experts_TS)
        if self.norm_topk_prob:
            weights_TS = weights_TS / weights_TS.sum(dim=-1, keepdim=True)
        return experts_TS, weights_TS.to(x_TD.dtype)
