"""Token embedding."""

from __future__ import annotations

from torch import Tensor, nn


class Embedding(nn.Embedding):
    """Rows of `weight`, looked up by indexing: on a GPU its backward repeats bit for bit, `F.embedding`'s does not."""

    def forward(self, input_ids_T: Tensor) -> Tensor:
        return self.weight[input_ids_T]
