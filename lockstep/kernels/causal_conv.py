"""Short causal convolution of every channel, then SiLU, over packed documents and one token at a time.

T packed tokens, C channels, W taps, P = W - 1 earlier inputs that a token sees, B documents, S state slots.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lockstep.kernels.delta_rule_choice import installed
from lockstep.kernels.gated_delta_rule import DeltaLayout


def causal_conv_reference(
    x_TC: Tensor, weight_CW: Tensor, lengths: list[int], state_BCP: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The specification: each document alone, after its P earlier inputs (zeros when None)."""
    channels, taps = weight_CW.shape
    outputs, states = [], []
    for document, x_LC in enumerate(x_TC.split(lengths)):
        earlier_CP = x_LC.new_zeros(channels, taps - 1) if state_BCP is None else state_BCP[document].to(x_LC.dtype)
        joined_CN = torch.cat([earlier_CP, x_LC.T], 1)
        windows_CLW = torch.stack([joined_CN[:, tap : tap + len(x_LC)] for tap in range(taps)], -1)
        outputs.append(F.silu((windows_CLW * weight_CW[:, None]).sum(-1)).T)
        states.append(joined_CN[:, len(x_LC) :])
    return torch.cat(outputs), torch.stack(states)


def causal_conv(
    x_TC: Tensor, weight_CW: Tensor, layout: DeltaLayout, state_BCP: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`silu(sum_w weight[:, w] * x[t - P + w])` in every document; inputs before its start come from `state_BCP`.

    Sums and SiLU in fp32, rounded once to the inputs' type.

    Returns:
        outputs [T, C], and the last P inputs [B, C, P] of each document, those of the state among them.
    """
    past = weight_CW.shape[1] - 1
    state = x_TC.new_zeros(len(layout.lengths), x_TC.shape[1], past) if state_BCP is None else state_BCP.to(x_TC.dtype)
    if _fits_triton(x_TC, layout):
        from lockstep.kernels.causal_conv_triton import CausalConv

        out_TC: Tensor = CausalConv.apply(x_TC, weight_CW, state, layout)  # type: ignore[no-untyped-call]
        return out_TC, _last_inputs(x_TC, state, layout)
    rows = layout.conv_rows(past)
    joined = x_TC.new_zeros(len(x_TC) + rows.earlier_BP.numel(), x_TC.shape[1]).index_copy(0, rows.tokens_T, x_TC)
    joined = joined.index_copy(0, rows.earlier_BP.flatten(), state.mT.flatten(0, 1))
    wide = joined.to(torch.promote_types(x_TC.dtype, torch.float32))
    summed = wide[past:] * weight_CW[:, past]
    for tap in range(past):
        summed = summed + wide[tap : tap - past] * weight_CW[:, tap]
    return F.silu(summed[rows.tokens_T - past]).to(x_TC.dtype), joined[rows.last_BP].mT


def _fits_triton(x_TC: Tensor, layout: DeltaLayout) -> bool:
    """As the delta rule, the kernel is for 16 bits: fp32 runs on a GPU are there to compare with a CPU."""
    is_16_bit = x_TC.dtype in (torch.bfloat16, torch.float16)
    return x_TC.is_cuda and is_16_bit and bool(layout.steps) and installed("triton") is not None


def _last_inputs(x_TC: Tensor, state_BCP: Tensor, layout: DeltaLayout) -> Tensor:
    past = state_BCP.shape[2]
    starts_B1, ends_B1 = layout.cu_seqlens[:-1, None].long(), layout.cu_seqlens[1:, None].long()
    rows_BP = ends_B1 - past + torch.arange(past, device=x_TC.device)
    columns_BP = (rows_BP - starts_B1 + past).clamp(max=past - 1)
    earlier_BCP = state_BCP.gather(2, columns_BP[:, None].expand_as(state_BCP))
    return torch.where((rows_BP >= starts_B1)[:, None], x_TC[rows_BP.clamp(min=0)].mT, earlier_BCP)


def causal_conv_step(x_BC: Tensor, weight_CW: Tensor, state_SCP: Tensor, slots_B: Tensor) -> Tensor:
    """One decode token per sequence. Reads and shifts the rows `slots_B` of the pool of earlier inputs, in place."""
    window_BCW = torch.cat([state_SCP[slots_B], x_BC.to(state_SCP.dtype)[..., None]], -1)
    state_SCP.index_copy_(0, slots_B, window_BCW[..., 1:])
    dtype = torch.promote_types(x_BC.dtype, torch.float32)
    return F.silu((window_BCW.to(dtype) * weight_CW).sum(-1)).to(x_BC.dtype)
