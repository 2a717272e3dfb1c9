"""Mixture-of-experts feed-forward for the few rows of a decoding step: what counts is to read weights once.

T tokens, D model width, E experts, I expert width, J = 2 I, S slots per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.kernels.experts import local_experts
from lockstep.kernels.fused import is_fused

MOST_TOKENS = 512
"""Above this, grouped products over sorted rows are faster."""


def decode_experts_reference(
    x_TD: Tensor,
    experts_TS: Tensor,
    weights_TS: Tensor,
    gate_up_EJD: Tensor,
    down_EDI: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The specification: every slot in turn, through the weights of its expert. Rounds where the kernels do."""
    sums_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    wide = sums_TD.dtype
    for token, chosen in enumerate(experts_TS.tolist()):
        for slot, expert in enumerate(chosen):
            if not 0 <= expert < len(gate_up_EJD):
                continue
            gate, up = (gate_up_EJD[expert] @ x_TD[token]).to(wide).chunk(2)
            inner = gate * torch.sigmoid(gate) * up * weights_TS[token, slot].to(wide)
            sums_TD[token] += down_EDI[expert] @ inner.to(x_TD.dtype)
    return sums_TD.to(dtype or x_TD.dtype)


def decode_experts(
    x_TD: Tensor,
    experts_TS: Tensor,
    weights_TS: Tensor,
    gate_up_EJD: Tensor,
    down_EDI: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """What the chosen experts add up to, `[T, D]`, as `grouped_experts`; no gradients.

    A slot whose expert is not one of 0 ... E - 1 counts nothing: it belongs to another rank, or to no token. Slots are
    summed in fp32 in the router's order. The launches depend on shapes alone, so a graph may hold them; results repeat
    bit for bit, and a token's do not depend on the tokens beside it, only on how many there are.

    Args:
        dtype: of the result; that of `x_TD` if None. fp32 leaves the sum unrounded, for ranks that add up theirs.
    """
    if is_fused(x_TD, gate_up_EJD, down_EDI):
        from lockstep.kernels.decode_experts_triton import decode_experts_triton

        return decode_experts_triton(x_TD, experts_TS, weights_TS, gate_up_EJD, down_EDI, dtype or x_TD.dtype)
    if any(weight.shape[-1] * weight.element_size() % 16 for weight in (gate_up_EJD, down_EDI)):
        return decode_experts_reference(x_TD, experts_TS, weights_TS, gate_up_EJD, down_EDI, dtype)
    return local_experts(x_TD, experts_TS, weights_TS, gate_up_EJD, down_EDI, dtype or x_TD.dtype)
