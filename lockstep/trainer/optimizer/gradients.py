"""Gradients between backward and update: where they add up, in which precision, and their exact norm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor


class Gradients:
    """Takes every gradient off its parameter as soon as backward has made it, and adds it to the sum of the step.

    Args:
        accumulate: type of the sums, fp32 or bf16. In bf16 every micro-batch after the first rounds the sum.
        keep: type in which a sum waits for the update once `settle` was called for it.

    Both hold for bf16 parameters; gradients of fp32 parameters are fp32 throughout.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, accumulate: torch.dtype, keep: torch.dtype) -> None:
        self._accumulate, self._keep = accumulate, keep
        self._sums: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(self._add, name))

    def _add(self, name: str, parameter: Tensor) -> None:
        assert name not in self._norms, f"{name} was settled, and then another gradient came"
        grad, parameter.grad = parameter.grad, None
        assert grad is not None
        if name in self._sums:
            self._sums[name].add_(grad)
        else:
            is_fp32 = parameter.dtype == torch.float32
            self._sums[name] = grad.contiguous() if is_fp32 else grad.contiguous().to(self._accumulate)

    def __getitem__(self, name: str) -> Tensor:
        return self._sums[name]

    @torch.no_grad()
    def settle(self, names: Iterable[str]) -> None:
        """Nothing more comes for these: measure them as they are, then keep them in `keep`.

        A backward that finishes one layer at a time calls it layer by layer, so that only one layer's sums are fp32.
        """
        for name in names:
            if name in self._sums:
                grad = self._sums[name]
                self._norms[name] = torch.linalg.vector_norm(grad, dtype=torch.float32)
                self._sums[name] = grad.to(self._keep) if grad.dtype == self._accumulate else grad

    @torch.no_grad()
    def norm(self) -> float:
        """Norm over all gradients, each measured in fp32 before it was rounded to `keep`."""
        norms = [
            self._norms[name] if name in self._norms else torch.linalg.vector_norm(grad, dtype=torch.float32)
            for name, grad in self._sums.items()
        ]
        return float(torch.linalg.vector_norm(torch.stack(norms)))

    def take(self, name: str) -> Tensor | None:
        """Hand the sum over; the caller frees it by forgetting it."""
        self._norms.pop(name, None)
        return self._sums.pop(name, None)

    def clear(self) -> None:
        self._sums.clear()
        self._norms.clear()
