"""Log-prob of each target and entropy of each row, straight from hidden states, without the full logits.

Shape suffixes: R rows (predictions), D model width, V vocabulary, C rows of one chunk, N kept tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lockstep.kernels.fused import is_fused

CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
"""Bytes of fp32 logits that one chunk may hold, by device type."""

FUSED_CHUNK_BYTES = 1280 * 2**20
"""Bytes of bf16 logits that one chunk of the fused version may hold. It makes no other tensor of that size."""

MIN_CHUNK_ROWS = 64
"""Every chunk reads the whole weight once, so a large vocabulary needs some rows to pay for it."""

Product = Callable[[Tensor, Tensor], Tensor]
"""Rows `[R, D]` times a matrix `[V, D]`: `[R, V]`."""

EXCLUDED = -1e30
"""Logit of a token outside the nucleus. Finite, so that probability 0 times it is 0, not NaN."""


@dataclass(frozen=True)
class KeptTokens:
    """The nucleus each row was sampled from, when the sampler cut the vocabulary (top_p or top_k).

    Row r was sampled from `token_ids[offsets[r]:offsets[r + 1]]`; an empty range means the whole vocabulary.
    """

    token_ids_N: Tensor
    offsets_R1: Tensor

    def rows_N(self) -> Tensor:
        """The row of each kept token."""
        sizes_R = self.offsets_R1.diff()
        return torch.repeat_interleave(torch.arange(len(sizes_R), device=sizes_R.device), sizes_R)

    def exclude_others(self, logits_CV: Tensor, start: int) -> None:
        """Set the logits of every token outside the nucleus to `EXCLUDED`, in place; row 0 is row `start` of all."""
        offsets_C1 = self.offsets_R1[start : start + len(logits_CV) + 1]
        sizes_C = offsets_C1.diff()
        rows = torch.repeat_interleave(torch.arange(len(sizes_C), device=sizes_C.device), sizes_C)
        kept = rows, self.token_ids_N[int(offsets_C1[0]) : int(offsets_C1[-1])]
        kept_logits = logits_CV[kept]
        logits_CV.masked_fill_((sizes_C > 0).unsqueeze(1), EXCLUDED)
        logits_CV[kept] = kept_logits


def linear_logits(
    hidden_RD: Tensor, weight_VD: Tensor, *, temperature: float = 1.0, product: Product | None = None
) -> Tensor:
    """Logits `[R, V]` divided by the temperature: multiplied in the inputs' type, returned in fp32 (or fp64).

    Sampler and trainer both take their logits from here, so that they agree.
    """
    logits_RV = hidden_RD @ weight_VD.T if product is None else product(hidden_RD, weight_VD)
    logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    return logits_RV if temperature == 1.0 else logits_RV.div_(temperature)


def linear_log_probs_reference(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_R: Tensor,
    *,
    temperature: float = 1.0,
    kept: KeptTokens | None = None,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """What `linear_log_probs` computes, with the full logits and autograd's own gradient."""
    logits_RV = (hidden_RD @ weight_VD.T).to(torch.promote_types(hidden_RD.dtype, torch.float32)) / temperature
    if kept is not None:
        kept_RV = (kept.offsets_R1.diff() == 0).unsqueeze(1).expand_as(logits_RV).clone()
        kept_RV[kept.rows_N(), kept.token_ids_N] = True
        logits_RV = torch.where(kept_RV, logits_RV, EXCLUDED)
    log_softmax_RV = logits_RV.log_softmax(-1)
    log_probs_R = log_softmax_RV.gather(1, targets_R.unsqueeze(1)).squeeze(1)
    return log_probs_R, -(log_softmax_RV.exp() * log_softmax_RV).sum(-1) if with_entropy else None


def linear_log_probs(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_R: Tensor,
    *,
    temperature: float = 1.0,
    kept: KeptTokens | None = None,
    chunk_rows: int | None = None,
    with_entropy: bool = True,
    product: Product | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of every row's target, and the entropy of every row's distribution.

    Works through `chunk_rows` rows of logits at a time, forward and backward, so memory is a few chunks, whatever R is.
    The backward pass computes each chunk again, except where one chunk holds all rows: that one is kept.
    Both results are [R], fp32 (fp64 for fp64 inputs), and differentiable once, in `hidden_RD` and `weight_VD`.
    The weight's gradient is summed over chunks in fp32.

    Args:
        temperature: the logits are divided by it, as in the sampler.
        kept: renormalise each row over these tokens, as the sampler did.
        chunk_rows: rows of logits that exist at once; by default as many as fit into `CHUNK_BYTES`, on a GPU
            in bf16 into `FUSED_CHUNK_BYTES`.
        with_entropy: off saves one pass over the logits; the entropy is then None.
        product: what multiplies hidden states with the weight, forward; by default torch's.
    Raises:
        ValueError: a target lies outside its row's kept tokens, so it cannot have been sampled.
    """
    if kept is not None:
        check_kept(kept, targets_R)
    function: Any = _LinearLogProbs
    default_rows = default_chunk_rows(len(weight_VD), hidden_RD.device.type)
    if is_fused(hidden_RD, weight_VD):
        from lockstep.kernels.linear_log_probs_triton import LinearLogProbs

        function = LinearLogProbs
        default_rows = even_chunk_rows(len(hidden_RD), max(MIN_CHUNK_ROWS, FUSED_CHUNK_BYTES // (2 * len(weight_VD))))
    result: tuple[Tensor, Tensor | None] = function.apply(
        hidden_RD, weight_VD, targets_R, temperature, kept, chunk_rows or default_rows, with_entropy, product
    )
    return result


def default_chunk_rows(vocab_size: int, device_type: str) -> int:
    """Rows of fp32 logits that fit into the device's `CHUNK_BYTES`, at least `MIN_CHUNK_ROWS`."""
    return max(MIN_CHUNK_ROWS, CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"]) // (4 * vocab_size))


def even_chunk_rows(num_rows: int, most: int) -> int:
    """At most `most` rows, in as few chunks as that allows and all of about one size, in multiples of 128."""
    chunks = max(1, -(-num_rows // most))
    return min(most, -(-max(1, num_rows) // (128 * chunks)) * 128)


def check_kept(kept: KeptTokens, targets_R: Tensor) -> None:
    num_rows = len(targets_R)
    if len(kept.offsets_R1) != num_rows + 1:
        raise ValueError(
            f"kept.offsets has {len(kept.offsets_R1)} entries for {num_rows} rows: give one more than there are rows."
        )
    rows_N = kept.rows_N()
    found_R = kept.offsets_R1.diff() == 0
    found_R[rows_N[kept.token_ids_N == targets_R[rows_N]]] = True
    if not found_R.all():
        raise ValueError(
            f"{int((~found_R).sum())} of {num_rows} targets are outside their kept tokens, where probability is 0; "
            "record the nucleus they were sampled from, or an empty range for tokens that the policy did not write."
        )


class _LinearLogProbs(torch.autograd.Function):
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
        dtype = torch.promote_types(hidden_RD.dtype, torch.float32)
        log_probs_R = hidden_RD.new_empty(len(hidden_RD), dtype=dtype)
        normalizer_R = torch.empty_like(log_probs_R)
        entropy_R = torch.empty_like(log_probs_R) if with_entropy else None
        log_softmax_CV = None
        for rows, logits_CV in _chunks(hidden_RD, weight_VD, temperature, kept, chunk_rows, product):
            targets_C1 = targets_R[rows].unsqueeze(1)
            log_softmax_CV = logits_CV.log_softmax(-1)
            log_probs_R[rows] = log_softmax_CV.gather(1, targets_C1).squeeze(1)
            normalizer_R[rows] = logits_CV.gather(1, targets_C1).squeeze(1) - log_probs_R[rows]
            if entropy_R is not None:
                probs_CV = torch.exp(log_softmax_CV, out=logits_CV)
                entropy_R[rows] = -torch.linalg.vecdot(probs_CV, log_softmax_CV)
        log_softmax_RV = log_softmax_CV if len(hidden_RD) <= chunk_rows else None
        ctx.save_for_backward(hidden_RD, weight_VD, targets_R, normalizer_R, entropy_R, log_softmax_RV)
        return log_probs_R, entropy_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs_R: Tensor | None, grad_entropy_R: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_RD, weight_VD, targets_R, normalizer_R, entropy_R, log_softmax_RV = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        if grad_log_probs_R is None:
            grad_log_probs_R = torch.zeros_like(normalizer_R)
        grad_hidden_RD = torch.empty_like(hidden_RD) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=normalizer_R.dtype) if needs_weight else None
        if log_softmax_RV is not None:
            chunks = iter([(slice(None), log_softmax_RV)])
        else:
            chunks = (
                (rows, logits_CV.sub_(normalizer_R[rows].unsqueeze(1)))
                for rows, logits_CV in _chunks(
                    hidden_RD, weight_VD, ctx.temperature, ctx.kept, ctx.chunk_rows, ctx.product
                )
            )
        for rows, log_softmax_CV in chunks:
            grad_logits_CV = _log_probs_grad(log_softmax_CV, targets_R[rows], grad_log_probs_R[rows])
            if grad_entropy_R is not None:
                grad_logits_CV.add_(_entropy_grad(log_softmax_CV, entropy_R[rows], grad_entropy_R[rows]))
            if ctx.temperature != 1.0:
                grad_logits_CV.div_(ctx.temperature)
            grad_logits_CV = grad_logits_CV.to(hidden_RD.dtype)
            if grad_hidden_RD is not None:
                torch.mm(grad_logits_CV, weight_VD, out=grad_hidden_RD[rows])
            if grad_weight_VD is not None:
                add_product(grad_weight_VD, grad_logits_CV.T, hidden_RD[rows])
        grad_weight_VD = None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_RD, grad_weight_VD, *[None] * 6


def _chunks(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    temperature: float,
    kept: KeptTokens | None,
    chunk_rows: int,
    product: Product | None,
) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(hidden_RD), chunk_rows):
        rows = slice(start, start + chunk_rows)
        logits_CV = linear_logits(hidden_RD[rows], weight_VD, temperature=temperature, product=product)
        if kept is not None:
            kept.exclude_others(logits_CV, start)
        yield rows, logits_CV


def _log_probs_grad(log_softmax_CV: Tensor, targets_C: Tensor, grad_C: Tensor) -> Tensor:
    """d log_prob = onehot - p, with respect to the logits."""
    grad_C1 = grad_C.unsqueeze(1)
    return log_softmax_CV.exp().mul_(-grad_C1).scatter_add_(1, targets_C.unsqueeze(1), grad_C1)


def _entropy_grad(log_softmax_CV: Tensor, entropy_C: Tensor, grad_C: Tensor) -> Tensor:
    """d entropy = -p (log p + entropy), with respect to the logits."""
    grad_C1 = grad_C.unsqueeze(1)
    return torch.addcmul(-grad_C1 * entropy_C.unsqueeze(1), -grad_C1, log_softmax_CV).mul_(log_softmax_CV.exp())


def add_product(total_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> None:
    if left_MK.dtype == total_MN.dtype:
        total_MN.addmm_(left_MK, right_KN)
    else:
        total_MN.add_(left_MK @ right_KN)
