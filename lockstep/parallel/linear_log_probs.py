"""Log-probs and entropies where every tensor-parallel rank holds a slice of the vocabulary.

As `kernels/linear_log_probs.py`, chunk by chunk of rows; per row only four numbers cross ranks, and only forward.

R rows (predictions), D model width, U this rank's slice of the vocabulary, C rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lockstep.kernels.linear_log_probs import (
    EXCLUDED,
    KeptTokens,
    add_product,
    check_kept,
    default_chunk_rows,
    linear_logits,
)


def vocab_parallel_log_probs(
    hidden_RD: Tensor,
    weight_UD: Tensor,
    targets_R: Tensor,
    group: dist.ProcessGroup,
    *,
    temperature: float = 1.0,
    kept: KeptTokens | None = None,
    chunk_rows: int | None = None,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """What `linear_log_probs` returns for the whole vocabulary, the same on every rank.

    Every rank passes the same rows and goes on with the results alike. The gradient of `hidden_RD` is this slice's
    share: it has to be summed over ranks.

    Raises:
        ValueError: a target lies outside its row's kept tokens.
    """
    if kept is not None:
        check_kept(kept, targets_R)
    if chunk_rows is None:
        chunk_rows = default_chunk_rows(len(weight_UD), hidden_RD.device.type)
    result: tuple[Tensor, Tensor | None] = _VocabParallelLogProbs.apply(  # type: ignore[no-untyped-call]
        hidden_RD, weight_UD, targets_R, _Slice(len(weight_UD), group, temperature, kept), chunk_rows, with_entropy
    )
    return result


class _Slice:
    """This rank's part of the logits."""

    def __init__(self, size: int, group: dist.ProcessGroup, temperature: float, kept: KeptTokens | None) -> None:
        self.group, self.temperature, self.kept = group, temperature, kept
        self.start, self.size = size * group.rank(), size

    def chunks(self, hidden_RD: Tensor, weight_UD: Tensor, chunk_rows: int) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(hidden_RD), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits_CU = linear_logits(hidden_RD[rows], weight_UD, temperature=self.temperature)
            if self.kept is not None:
                self._exclude_others(self.kept, logits_CU, start)
            yield rows, logits_CU

    def places(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of these tokens, and which of them are in this slice (the columns of others are 0)."""
        places = token_ids - self.start
        is_mine = (places >= 0) & (places < self.size)
        return torch.where(is_mine, places, 0), is_mine

    def _exclude_others(self, kept: KeptTokens, logits_CU: Tensor, start: int) -> None:
        offsets = kept.offsets_R1[start : start + len(logits_CU) + 1]
        sizes_C = offsets.diff()
        excluded_CU = (sizes_C > 0).unsqueeze(1).expand_as(logits_CU).clone()
        rows = torch.repeat_interleave(torch.arange(len(sizes_C), device=sizes_C.device), sizes_C)
        places, is_mine = self.places(kept.token_ids_N[int(offsets[0]) : int(offsets[-1])])
        excluded_CU[rows[is_mine], places[is_mine]] = False
        logits_CU.masked_fill_(excluded_CU, EXCLUDED)


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        weight_UD: Tensor,
        targets_R: Tensor,
        part: _Slice,
        chunk_rows: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.part, ctx.chunk_rows = part, chunk_rows
        ctx.set_materialize_grads(False)
        dtype = torch.promote_types(hidden_RD.dtype, torch.float32)
        normalizer_R, log_probs_R, entropy_R = hidden_RD.new_empty(3, len(hidden_RD), dtype=dtype)
        for rows, logits_CU in part.chunks(hidden_RD, weight_UD, chunk_rows):
            largest_C = logits_CU.amax(1)
            dist.all_reduce(largest_C, dist.ReduceOp.MAX, group=part.group)
            shifted_CU = logits_CU.sub_(largest_C.unsqueeze(1))
            places_C, is_mine_C = part.places(targets_R[rows])
            target_C = torch.where(is_mine_C, shifted_CU.gather(1, places_C.unsqueeze(1)).squeeze(1), 0.0)
            exp_CU = shifted_CU.exp()
            sums = torch.stack([exp_CU.sum(1), target_C, torch.linalg.vecdot(exp_CU, shifted_CU)])
            dist.all_reduce(sums, group=part.group)
            total_C, target_C, expected_C = sums
            normalizer_R[rows] = largest_C + total_C.log()
            log_probs_R[rows] = target_C - total_C.log()
            entropy_R[rows] = total_C.log() - expected_C / total_C
        ctx.save_for_backward(hidden_RD, weight_UD, targets_R, normalizer_R, entropy_R)
        return log_probs_R, entropy_R if with_entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs_R: Tensor | None, grad_entropy_R: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_RD, weight_UD, targets_R, normalizer_R, entropy_R = ctx.saved_tensors
        if grad_log_probs_R is None:
            grad_log_probs_R = torch.zeros_like(normalizer_R)
        grad_hidden_RD = torch.empty_like(hidden_RD)
        grad_weight_UD = torch.zeros_like(weight_UD, dtype=normalizer_R.dtype)
        for rows, logits_CU in ctx.part.chunks(hidden_RD, weight_UD, ctx.chunk_rows):
            log_softmax_CU = logits_CU.sub_(normalizer_R[rows].unsqueeze(1))
            probs_CU = log_softmax_CU.exp()
            per_prob_CU = (-grad_log_probs_R[rows]).unsqueeze(1)
            if grad_entropy_R is not None:
                # d entropy = -p (log p + entropy)
                from_entropy_CU = log_softmax_CU.add_(entropy_R[rows].unsqueeze(1))
                per_prob_CU = per_prob_CU - from_entropy_CU.mul_(grad_entropy_R[rows].unsqueeze(1))
            grad_logits_CU = probs_CU.mul_(per_prob_CU)
            places_C, is_mine_C = ctx.part.places(targets_R[rows])
            from_target_C = torch.where(is_mine_C, grad_log_probs_R[rows], 0.0)
            grad_logits_CU.scatter_add_(1, places_C.unsqueeze(1), from_target_C.unsqueeze(1))
            grad_logits_CU = grad_logits_CU.div_(ctx.part.temperature).to(hidden_RD.dtype)
            torch.mm(grad_logits_CU, weight_UD, out=grad_hidden_RD[rows])
            add_product(grad_weight_UD, grad_logits_CU.T, hidden_RD[rows])
        return grad_hidden_RD, grad_weight_UD.to(weight_UD.dtype), None, None, None, None
