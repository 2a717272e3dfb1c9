"""A whole model on every rank, gathered from its shards for as long as something decodes on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lockstep.models import LanguageModel, build_model


class WholeModel:
    """A model of one device whose weights have memory only while they are gathered.

    The model and its parameters stay the same objects, so that whoever decodes on it may keep it.

    Args:
        sharded: a model whose every parameter is a DTensor, on ranks that hold all layers between them.
    """

    def __init__(self, sharded: LanguageModel, device: torch.device) -> None:
        self._stored = dict(sharded.named_parameters())
        dtype = next(iter(self._stored.values())).dtype
        with torch.device("meta"):
            model = build_model(sharded.config).to(dtype)
        self.model = model.to_empty(device=device).requires_grad_(False)
        self.model.tie_weights()
        self._drop()

    @contextmanager
    def gathered(self) -> Iterator[LanguageModel]:
        """Called by all ranks; one parameter at a time crosses between them."""
        try:
            for name, parameter in self.model.named_parameters():
                parameter.untyped_storage().resize_(parameter.numel() * parameter.element_size())
                parameter.copy_(_full(self._stored[name]))
            yield self.model
        finally:
            self._drop()

    def _drop(self) -> None:
        for parameter in self.model.parameters():
            parameter.untyped_storage().resize_(0)


def _full(stored: Tensor) -> Tensor:
    assert isinstance(stored, DTensor), "a sharded model has nothing but DTensors"
    return stored.detach().full_tensor()
