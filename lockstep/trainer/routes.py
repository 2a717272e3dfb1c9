"""What the trainer does with expert routes: compare them with the sampler's, or replay them.

T packed tokens, L sparse layers, S expert slots, E experts. Both are `ChooseExperts`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.models.layers.moe import ChooseExperts, top_k_experts


class CompareRoutes:
    """The router decides; `differs_T` marks tokens whose experts are not the recorded set in some layer."""

    def __init__(self, recorded_TLS: Tensor) -> None:
        self.recorded_TLS = recorded_TLS
        self.differs_T = torch.zeros(len(recorded_TLS), dtype=torch.bool, device=recorded_TLS.device)

    def __call__(self, moe_index: int, probs_TE: Tensor, top_k: int) -> Tensor:
        chosen_TS = top_k_experts(moe_index, probs_TE, top_k)
        recorded_TS = self.recorded_TLS[:, moe_index]
        same = (chosen_TS.sort(-1).values == recorded_TS.sort(-1).values).all(-1)
        self.differs_T |= ~same & (recorded_TS[:, 0] >= 0)
        return chosen_TS


class ReplayRoutes:
    """The recorded experts serve each token; weights still come from the current router.

    Where nothing was recorded (-1) the router decides. Source: routing replay, arXiv:2507.18071 section 5.3 (R2), and
    rollout routing replay, arXiv:2510.11370 (R3).
    """

    def __init__(self, recorded_TLS: Tensor) -> None:
        self.recorded_TLS = recorded_TLS
        self.differs_T = torch.zeros(len(recorded_TLS), dtype=torch.bool, device=recorded_TLS.device)

    def __call__(self, moe_index: int, probs_TE: Tensor, top_k: int) -> Tensor:
        recorded_TS = self.recorded_TLS[:, moe_index]
        return torch.where(recorded_TS >= 0, recorded_TS, top_k_experts(moe_index, probs_TE, top_k))


def choose_experts(recorded_TLS: Tensor | None, *, replays: bool) -> ChooseExperts:
    """The router's own choice where nothing was recorded; else replayed, or compared with the record."""
    if recorded_TLS is None:
        return top_k_experts
    return (ReplayRoutes if replays else CompareRoutes)(recorded_TLS)
