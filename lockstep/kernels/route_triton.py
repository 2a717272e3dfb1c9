"""The Triton kernel of `lockstep.kernels.route`. Import it only where there is a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lockstep.kernels.overlap_triton import begin, overlapping


def route_triton(logits_TE: Tensor, slots: int, *, renormalises: bool) -> tuple[Tensor, Tensor]:
    """`route`: a token for each program, everything in registers."""
    logits_TE = logits_TE.contiguous()
    tokens, experts = logits_TE.shape
    ids_TS = torch.empty((tokens, slots), dtype=torch.int64, device=logits_TE.device)
    weights_TS = torch.empty((tokens, slots), dtype=logits_TE.dtype, device=logits_TE.device)
    if tokens:
        _route[(tokens,)](
            logits_TE, ids_TS, weights_TS, experts, RENORMALISES=renormalises,
            SLOTS=slots, PLACES=triton.next_power_of_2(slots), BLOCK=triton.next_power_of_2(experts), num_warps=1,
            **overlapping(logits_TE.device),
        )  # fmt: skip
    return ids_TS, weights_TS


@triton.jit  # type: ignore[untyped-decorator]
def _route(  # type: ignore[no-untyped-def]
    logits, ids, weights, experts,
    RENORMALISES: tl.constexpr, SLOTS: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    begin(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    x = tl.load(logits + token * experts + expert, mask=expert < experts, other=float("-inf")).to(tl.float32)
    shares = tl.exp(x - tl.max(x, 0))
    probs = shares / tl.sum(shares, 0)
    left = tl.where(expert < experts, probs, -1.0)
    place = tl.arange(0, PLACES)
    chosen = tl.zeros((PLACES,), tl.int64)
    found = tl.zeros((PLACES,), tl.float32)
    for slot in tl.static_range(SLOTS):
        best = tl.argmax(left, 0, tie_break_left=True)
        chosen = tl.where(place == slot, best.to(tl.int64), chosen)
        found = tl.where(place == slot, tl.max(left, 0), found)
        left = tl.where(expert == best, -1.0, left)
    if RENORMALISES:
        found = found / tl.sum(found, 0)
    inside = place < SLOTS
    tl.store(ids + token * SLOTS + place, chosen, mask=inside)
    tl.store(weights + token * SLOTS + place, found.to(weights.dtype.element_ty), mask=inside)
