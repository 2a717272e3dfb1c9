"""Token embedding."""

from __future__ import annotations

from torch import Tensor, nn

from lockstep.kernels.lookup import look_up


class Embedding(nn.Embedding):
    """Rows of `weight`, with a gradient that repeats bit for bit."""

    def forward(self, input_ids_T: Tensor) -> Tensor:
        return look_up(self.weight, input_ids_T)
