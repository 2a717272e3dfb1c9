"""One token per row of logits, and its log-prob, where nothing is cut off the distribution.

B rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.kernels.fused import runs_triton


def sample_tokens_reference(logits_BV: Tensor, temperatures_B: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """The specification: every log-prob, and the cumulative distribution in fp64."""
    is_greedy_B = temperatures_B == 0
    wide = torch.promote_types(logits_BV.dtype, torch.float32)
    log_probs_BV = (logits_BV.to(wide) / temperatures_B.masked_fill(is_greedy_B, 1.0)[:, None]).log_softmax(-1)
    cumulative_BV = log_probs_BV.double().exp_().cumsum_(-1)
    thresholds_B1 = (uniforms_B * cumulative_BV[:, -1])[:, None]
    drawn_B = torch.searchsorted(cumulative_BV, thresholds_B1, right=True).squeeze(1)
    tokens_B = torch.where(is_greedy_B, logits_BV.argmax(-1), drawn_B.clamp_(max=logits_BV.shape[1] - 1))
    return tokens_B, log_probs_BV.gather(1, tokens_B[:, None]).squeeze(1)


def sample_tokens(logits_BV: Tensor, temperatures_B: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution at `uniforms_B` in [0, 1).

    A temperature of 0 takes the largest logit (of equal ones the first); its log-prob is that of temperature 1.

    Returns:
        token ids [B], int64, and their log-probs [B] after temperature, fp32.

    The GPU's version reads bf16 or fp32 logits once, sums in fp32 and walks the cumulative distribution in fp64: its
    steps lie within 1e-6 of the specification's, so another token comes out where a uniform number falls that close to
    a step. Log-probs agree to 1e-5. It repeats bit for bit, and a row does not depend on the others.
    """
    if runs_triton(logits_BV) and logits_BV.dtype in (torch.bfloat16, torch.float32):
        from lockstep.kernels.sample_triton import sample_tokens_triton

        return sample_tokens_triton(logits_BV, temperatures_B, uniforms_B)
    return sample_tokens_reference(logits_BV, temperatures_B, uniforms_B)
