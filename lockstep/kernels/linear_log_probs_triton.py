"""The fused version of `lockstep.kernels.linear_log_probs`: two kernels over chunks of bf16 logits.

Forward reads each logit once. Backward turns the logits of a chunk into their gradient in place. The logits are the
matrix product's own, rounded to bf16 as the sampler has them; everything after is in fp32. Import it only where there
is a GPU.

R rows, D model width, V vocabulary, C rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lockstep.kernels.linear_log_probs import EXCLUDED, KeptTokens, Product

_COLUMNS = 4096
"""Logits of a row that a program holds at once."""


class LinearLogProbs(torch.autograd.Function):
    """As `linear_log_probs`, for bf16 on a GPU."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        targets_R: Tensor,
        temperature: float,
        kept: KeptTokens | None,
        chunk_rows: int,
        with_entropy: bool,
        product: Product | None,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.temperature, ctx.kept, ctx.chunk_rows, ctx.product = temperature, kept, chunk_rows, product
        ctx.set_materialize_grads(False)
        num_rows = len(hidden_RD)
        log_probs_R, normalizer_R, entropy_R = hidden_RD.new_empty(3, num_rows, dtype=torch.float32)
        logits_CV = None
        for rows, logits_CV in _chunks(hidden_RD, weight_VD, kept, chunk_rows, product):
            _statistics[(len(logits_CV),)](
                logits_CV, targets_R[rows], log_probs_R[rows], normalizer_R[rows], entropy_R[rows],
                len(weight_VD), temperature, LOWEST=EXCLUDED,
                DIVIDES=temperature != 1.0, PER_ROW=False, WITH_ENTROPY=with_entropy, BLOCK=_COLUMNS, num_warps=8,
            )  # fmt: skip
        kept_logits_RV = logits_CV if num_rows <= chunk_rows else None
        ctx.save_for_backward(hidden_RD, weight_VD, targets_R, normalizer_R, entropy_R, kept_logits_RV)
        return log_probs_R, entropy_R if with_entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs_R: Tensor | None, grad_entropy_R: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_RD, weight_VD, targets_R, normalizer_R, entropy_R, kept_logits_RV = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        if grad_log_probs_R is None:
            grad_log_probs_R = torch.zeros_like(normalizer_R)
        grad_hidden_RD = torch.empty_like(hidden_RD) if needs_hidden else None
        grad_weight_VD = None
        grad_log_probs_R = grad_log_probs_R.contiguous()
        grad_entropies_R = grad_log_probs_R if grad_entropy_R is None else grad_entropy_R.contiguous()
        if kept_logits_RV is not None:
            chunks = iter([(slice(None), kept_logits_RV)])
        else:
            chunks = _chunks(hidden_RD, weight_VD, ctx.kept, ctx.chunk_rows, ctx.product)
        for rows, logits_CV in chunks:
            # What forward kept may be wanted a second time.
            grad_CV = logits_CV if kept_logits_RV is None else torch.empty_like(logits_CV)
            _gradient[(len(logits_CV), triton.cdiv(len(weight_VD), _COLUMNS))](
                logits_CV, targets_R[rows], normalizer_R[rows], entropy_R[rows], grad_log_probs_R[rows],
                grad_entropies_R[rows], grad_CV, len(weight_VD), ctx.temperature,
                DIVIDES=ctx.temperature != 1.0, WITH_ENTROPY=grad_entropy_R is not None, BLOCK=_COLUMNS, num_warps=4,
            )  # fmt: skip
            if grad_hidden_RD is not None:
                torch.mm(grad_CV, weight_VD, out=grad_hidden_RD[rows])
            if needs_weight:
                grad_weight_VD = _plus_product(grad_weight_VD, grad_CV.T, hidden_RD[rows])
        if grad_weight_VD is None:
            grad_weight_VD = torch.zeros_like(weight_VD) if needs_weight else None
        else:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_RD, grad_weight_VD, *[None] * 6


def _chunks(
    hidden_RD: Tensor, weight_VD: Tensor, kept: KeptTokens | None, chunk_rows: int, product: Product | None
) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of undivided logits; torch's product puts all of them into the same memory."""
    memory_CV = hidden_RD.new_empty(0 if product else min(chunk_rows, len(hidden_RD)), len(weight_VD))
    for start in range(0, len(hidden_RD), chunk_rows):
        rows = slice(start, start + chunk_rows)
        hidden_CD = hidden_RD[rows]
        if product is None:
            logits_CV = torch.mm(hidden_CD, weight_VD.T, out=memory_CV[: len(hidden_CD)])
        else:
            logits_CV = product(hidden_CD, weight_VD)
        if kept is not None:
            kept.exclude_others(logits_CV, start)
        yield rows, logits_CV


def log_probs_of_logits(logits_BV: Tensor, targets_B: Tensor, temperatures_B: Tensor) -> Tensor:
    """What `LinearLogProbs` gives for these logits, `[B]` in fp32, where every row has a temperature of its own."""
    log_probs_B = torch.empty(len(logits_BV), dtype=torch.float32, device=logits_BV.device)
    if len(logits_BV):
        _statistics[(len(logits_BV),)](
            logits_BV.contiguous(), targets_B, log_probs_B, torch.empty_like(log_probs_B), log_probs_B,
            logits_BV.shape[1], temperatures_B, LOWEST=EXCLUDED,
            DIVIDES=True, PER_ROW=True, WITH_ENTROPY=False, BLOCK=_COLUMNS, num_warps=8,
        )  # fmt: skip
    return log_probs_B


def _plus_product(total_MN: Tensor | None, left_MK: Tensor, right_KN: Tensor) -> Tensor:
    """An fp32 sum (None: nothing yet) plus a product of bf16 matrices, unrounded; the sum's memory is used again."""
    if total_MN is None:
        return torch.mm(left_MK, right_KN, out_dtype=torch.float32)
    return torch.addmm(total_MN, left_MK, right_KN, out_dtype=torch.float32, out=total_MN)


@triton.jit  # type: ignore[untyped-decorator]
def _statistics(  # type: ignore[no-untyped-def]
    logits, targets, log_probs, normalizers, entropies, vocab_size, temperature,
    LOWEST: tl.constexpr, DIVIDES: tl.constexpr, PER_ROW: tl.constexpr, WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: sums of exp(x - largest) and exp(x - largest) (x - largest), rescaled when a larger logit is met."""
    row = tl.program_id(0)
    if PER_ROW:
        temperature = tl.load(temperature + row)
    line = logits + row.to(tl.int64) * vocab_size
    place = tl.arange(0, BLOCK)
    largest = tl.full((), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    ahead = tl.load(line + place, mask=place < vocab_size, other=LOWEST)
    for start in range(0, vocab_size, BLOCK):
        x = ahead.to(tl.float32)
        inside = start + place < vocab_size
        column = start + BLOCK + place
        ahead = tl.load(line + column, mask=column < vocab_size, other=LOWEST)
        if DIVIDES:
            x = tl.div_rn(x, temperature)
        new_largest = tl.maximum(largest, tl.max(x, 0))
        shifted = x - new_largest
        exp = tl.where(inside, tl.exp(shifted), 0.0)
        rescale = tl.exp(largest - new_largest)
        if WITH_ENTROPY:
            weighted = (weighted + total * (largest - new_largest)) * rescale + exp * shifted
        total = tl.fma(total, rescale, exp)  # in so many words: the variants must round alike
        largest = new_largest
    log_total = tl.log(tl.sum(total, 0))
    target = tl.load(line + tl.load(targets + row)).to(tl.float32)
    if DIVIDES:
        target = tl.div_rn(target, temperature)
    tl.store(log_probs + row, (target - largest) - log_total)
    tl.store(normalizers + row, largest + log_total)
    if WITH_ENTROPY:
        tl.store(entropies + row, log_total - tl.sum(weighted, 0) / tl.sum(total, 0))


@triton.jit  # type: ignore[untyped-decorator]
def _gradient(  # type: ignore[no-untyped-def]
    logits, targets, normalizers, entropies, grad_log_probs, grad_entropies, grad_logits, vocab_size, temperature,
    DIVIDES: tl.constexpr, WITH_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d log_prob = onehot - p and d entropy = -p (log p + entropy), with respect to the undivided logits."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocab_size
    start = row.to(tl.int64) * vocab_size
    log_p = tl.load(logits + start + column, mask=inside, other=0.0).to(tl.float32)
    if DIVIDES:
        log_p = tl.div_rn(log_p, temperature)
    log_p -= tl.load(normalizers + row)
    grad = tl.load(grad_log_probs + row)
    per_p = -grad
    if WITH_ENTROPY:
        per_p = per_p - tl.load(grad_entropies + row) * (log_p + tl.load(entropies + row))
    result = tl.exp(log_p) * per_p + tl.where(column == tl.load(targets + row), grad, 0.0)
    if DIVIDES:
        result = result / temperature
    tl.store(grad_logits + start + column, result, mask=inside)
