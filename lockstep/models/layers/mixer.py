"""Everything in which a token sees other tokens, behind one seam.

The rest of a model works on each row alone. Training mixes over packed documents, the sampler over its caches.

T packed tokens, N query heads, K key/value heads, H head dim; of the delta rule: V value heads, J value head dim, C
channels and W taps of its convolution.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from torch import Tensor

from lockstep.models.layers.norm import RMSNorm


class TokenMixer(Protocol):
    """Causal, and inside each document only. The index counts the layers of that kind from 0."""

    def attend(self, attention_index: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Attended values `[T, N, H]`."""
        ...

    def convolve(self, delta_index: int, x_TC: Tensor, weight_CW: Tensor) -> Tensor:
        """Each channel over the last W tokens of its document, then silu: `[T, C]`."""
        ...

    def delta_rule(
        self, delta_index: int, q_TKH: Tensor, k_TKH: Tensor, v_TVJ: Tensor, log_decay_TV: Tensor, beta_TV: Tensor
    ) -> Tensor:
        """What the recurrent state answers to each query, `[T, V, J]`: see `kernels/gated_delta_rule.py`."""
        ...


class NormsAndAttends(ABC):
    """What a `TokenMixer` is as well that takes queries and keys as they were projected, to save launches."""

    @abstractmethod
    def norm_and_attend(
        self,
        attention_index: int,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        norms: tuple[RMSNorm, RMSNorm],
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:
        """`attend` after `norm_and_rotate` of queries and keys, by their norms and the tables of `rotary_tables`."""
