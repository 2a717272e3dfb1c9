"""How a trainer's pack is computed, for the model that it is given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from lockstep.exact.layers import is_exact
from lockstep.kernels.fixed_attention import FixedAttention
from lockstep.kernels.fixed_product import fixed_product
from lockstep.kernels.linear_log_probs import linear_log_probs
from lockstep.kernels.packed import PackedDocuments
from lockstep.models import LanguageModel


class ExactDocuments(PackedDocuments):
    """Attention of a token over its own document, by blocks of keys whose order nothing else changes."""

    def attend(self, attention_index: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        if q_TNH.is_cuda:
            return super().attend(attention_index, q_TNH, k_TKH, v_TKH)  # by the kernel that `FixedAttention` has too
        return FixedAttention(self.lengths, self.lengths, self.device)(q_TNH, k_TKH, v_TKH)


def packed_documents(model: LanguageModel) -> type[PackedDocuments]:
    """Which `TokenMixer` the trainer of this model needs."""
    return ExactDocuments if is_exact(model) else PackedDocuments


def log_probs_for(model: LanguageModel) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """`linear_log_probs` as the trainer of this model needs it."""
    return partial(linear_log_probs, product=fixed_product) if is_exact(model) else linear_log_probs
