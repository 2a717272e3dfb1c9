"""Which experts serve a token and how much each weighs, where nobody wants a gradient or another choice.

T tokens, E experts, S slots per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.kernels.fused import is_fused
from lockstep.kernels.top_k import top_k


def route_reference(logits_TE: Tensor, slots: int, *, renormalises: bool) -> tuple[Tensor, Tensor]:
    """The specification: softmax over all experts, the highest, their weights."""
    probs_TE = logits_TE.softmax(-1, dtype=torch.float32)
    experts_TS = top_k(probs_TE, slots)
    weights_TS = probs_TE.gather(-1, experts_TS)
    if renormalises:
        weights_TS = weights_TS / weights_TS.sum(-1, keepdim=True)
    return experts_TS, weights_TS.to(logits_TE.dtype)


def route(logits_TE: Tensor, slots: int, *, renormalises: bool) -> tuple[Tensor, Tensor]:
    """Expert ids [T, S] from the highest probability down, of equal ones the lower first, and their weights [T, S].

    Args:
        renormalises: let a token's weights add up to 1.
    """
    if is_fused(logits_TE):
        from lockstep.kernels.route_triton import route_triton

        return route_triton(logits_TE, slots, renormalises=renormalises)
    return route_reference(logits_TE, slots, renormalises=renormalises)
