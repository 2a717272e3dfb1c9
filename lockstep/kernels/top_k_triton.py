"""The Triton kernel of `lockstep.kernels.top_k`. Import it only where there is a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUMBERS = 2048
"""Scores that a program holds at once."""


def top_k_fused(scores_TE: Tensor, slots: int) -> Tensor:
    """Ids `[T, S]` of the highest fp32 scores; of equal ones the lower id first."""
    tokens, experts = scores_TE.shape
    ids_TS = torch.empty(tokens, slots, dtype=torch.int64, device=scores_TE.device)
    block = triton.next_power_of_2(experts)
    rows = max(1, _NUMBERS // block)
    if tokens:
        _top_k[(triton.cdiv(tokens, rows),)](
            scores_TE.detach().contiguous(), ids_TS, tokens, experts, SLOTS=slots, ROWS=rows, BLOCK=block
        )
    return ids_TS


@triton.jit  # type: ignore[untyped-decorator]
def _top_k(  # type: ignore[no-untyped-def]
    scores, ids, tokens, experts, SLOTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, BLOCK)[None, :]
    inside = (token < tokens)[:, None] & (expert < experts)
    score = tl.load(scores + token[:, None] * experts + expert, mask=inside, other=float("-inf"))
    for slot in tl.static_range(SLOTS):
        best = tl.argmax(score, 1, tie_break_left=True)
        tl.store(ids + token * SLOTS + slot, best.to(tl.int64), mask=token < tokens)
        score = tl.where(expert == best[:, None], float("-inf"), score)
