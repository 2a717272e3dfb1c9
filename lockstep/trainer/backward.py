"""In which order a step's micro-batches and layers are computed backward.

Both orders recompute a layer's activations from its input when they come to it, and both give the same gradients, up to
the order of their sums.

T packed tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lockstep.models import LanguageModel
from lockstep.models.language_model import RunLayer, run_layer
from lockstep.models.layers.mixer import TokenMixer
from lockstep.models.layers.moe import ChooseExperts


@dataclass(frozen=True)
class Pass:
    """One micro-batch on its way through the model, and how it ends: from hidden states `[T, D]` to a loss."""

    input_ids_T: Tensor
    positions_T: Tensor
    mixer: TokenMixer
    choose: ChooseExperts
    finish: Callable[[Tensor], Tensor]


class BackwardOrder(Protocol):
    """Computes all passes and leaves the sum of their gradients."""

    def run(self, model: LanguageModel, passes: Iterable[Pass]) -> None: ...


class ByMicroBatch:
    """Forward and backward of one micro-batch after the other.

    Args:
        recompute: keep only the input of every layer, not what is inside it.
    """

    def __init__(self, *, recompute: bool) -> None:
        self._run_layer: RunLayer = partial(checkpoint, use_reentrant=False) if recompute else run_layer

    def run(self, model: LanguageModel, passes: Iterable[Pass]) -> None:
        for one in passes:
            hidden_TD = model(one.input_ids_T, one.positions_T, one.mixer, one.choose, self._run_layer)
            one.finish(hidden_TD).backward()


class ByLayer:
    """Forward of all micro-batches, keeping the inputs of layers; then each layer, from the last, backward for all.

    A layer's gradients are complete before the next layer's begin. So they may add up in fp32 and be rounded once, and
    only one layer's fp32 sums exist at a time. It needs room for the layer inputs of the whole step, `2 T D` bytes per
    layer in bf16, which is given back layer by layer while gradients appear.

    Args:
        settle: told the names of parameters whose gradients are complete.
        gathered: makes the weights of a block whole while its context is open, or of the model those outside blocks.
            They are asked for twice a step, however many micro-batches it has.
    """

    def __init__(
        self,
        settle: Callable[[list[str]], None],
        gathered: Callable[[nn.Module], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._settle = settle
        self._gathered = gathered

    def run(self, model: LanguageModel, passes: Iterable[Pass]) -> None:
        with self._gathered(model):
            self._run(model, list(passes))

    def _run(self, model: LanguageModel, passes: list[Pass]) -> None:
        rotary = [model.rotary(one.positions_T) for one in passes]
        inputs = self._layer_inputs(model, passes, rotary)
        grads = []
        for one, own in zip(passes, inputs, strict=True):
            last_TD = own.pop().requires_grad_()
            one.finish(model.model.norm(last_TD)).backward()
            grads.append(last_TD.grad)
        self._settle([f"model.norm.{name}" for name, _ in model.model.norm.named_parameters()])
        if not model.config.tie_word_embeddings:
            self._settle([f"lm_head.{name}" for name, _ in model.lm_head.named_parameters()])
        for key, block in reversed(list(model.model.layers.items())):
            with self._gathered(block):
                for number, one in enumerate(passes):
                    x_TD = inputs[number].pop().requires_grad_()
                    block(x_TD, rotary[number], one.mixer, one.choose).backward(grads[number])
                    grads[number] = x_TD.grad
            self._settle([f"model.layers.{key}.{name}" for name, _ in block.named_parameters()])
        for one, grad_TD in zip(passes, grads, strict=True):
            model.model.embed_tokens(one.input_ids_T).backward(grad_TD)
        self._settle(["model.embed_tokens.weight"])

    @torch.no_grad()
    def _layer_inputs(
        self, model: LanguageModel, passes: list[Pass], rotary: list[tuple[Tensor, Tensor]]
    ) -> list[list[Tensor]]:
        """For each pass what each block gets, and last what the final norm gets.

        Layer by layer here too: an update that is still streaming has the whole forward to hide behind.
        """
        inputs = [[model.model.embed_tokens(one.input_ids_T)] for one in passes]
        for block in model.model.layers.values():
            with self._gathered(block):
                for one, own, tables in zip(passes, inputs, rotary, strict=True):
                    own.append(block(own[-1], tables, one.mixer, one.choose))
        return inputs
