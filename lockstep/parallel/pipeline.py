"""Pipeline parallelism: every rank holds some of the layers, and micro-batches flow through them.

The schedule is 1F1B (PipeDream-Flush, arXiv:2104.04473): after a warm-up each stage alternates forward and backward,
so that it keeps activations of no more micro-batches than there are stages after it. Micro-batches may differ in size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lockstep.models import LanguageModel
from lockstep.parallel.mesh import Meshes


class FromPreviousStage(nn.Module):
    """Stands where a first stage has its embedding: gives the hidden states that arrived."""

    def __init__(self) -> None:
        super().__init__()
        self.received: Tensor | None = None

    def forward(self, input_ids_T: Tensor) -> Tensor:
        assert self.received is not None, "a later stage computes on what it received"
        received, self.received = self.received, None
        return received.requires_grad_(torch.is_grad_enabled())


def keep_stage(model: LanguageModel, meshes: Meshes) -> None:
    """Drop what other stages hold, in place. Names of layers stay those of the whole model."""
    layers = meshes.layout.stage_layers(model.config.num_hidden_layers)[meshes.pp_rank]
    for name in list(model.model.layers):
        if int(name) not in layers:
            del model.model.layers[name]
    nothing: Any = nn.Identity()
    if not meshes.is_first_stage:
        before: Any = FromPreviousStage()
        model.model.embed_tokens = before
    if not meshes.is_last_stage:
        model.model.norm = nothing
        model.lm_head = nothing


StageForward = Callable[[int, Tensor | None], Tensor]
"""(micro-batch, hidden states that arrived) -> hidden states to pass on, or the loss on the last stage."""


class Pipeline:
    """Runs micro-batches through the stages; with one stage it is a plain loop.

    Args:
        shapes: of the hidden states of every micro-batch, the same on all stages.
    """

    def __init__(self, meshes: Meshes, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device):
        self.meshes, self.shapes, self.dtype, self.device = meshes, shapes, dtype, device
        self.group = meshes.group("pp")

    def forward_only(self, forward: StageForward) -> None:
        for index in range(len(self.shapes)):
            out = forward(index, self._receive_forward(index))
            self._send_forward(out)

    def forward_backward(self, forward: StageForward) -> None:
        """Leaves the gradients of all micro-batches on the parameters."""
        count, waiting = len(self.shapes), deque[tuple[Tensor | None, Tensor]]()
        num_warmup = min(self.meshes.layout.pp_size - 1 - self.meshes.pp_rank, count)
        for index in range(num_warmup):
            received = self._receive_forward(index)
            waiting.append((received, forward(index, received)))
            self._send_forward(waiting[-1][1])
        received = self._receive_forward(num_warmup) if num_warmup < count else None
        for index in range(num_warmup, count):
            waiting.append((received, forward(index, received)))
            grad = self._send_forward_receive_backward(waiting[-1][1], waiting[0][1])
            input_grad = _backward(*waiting.popleft(), grad)
            received = self._send_backward_receive_forward(input_grad, index + 1)
        for _ in range(num_warmup):
            grad = self._receive_backward(waiting[0][1])
            self._send_backward(_backward(*waiting.popleft(), grad))

    def _receive_forward(self, index: int) -> Tensor | None:
        return self._exchange(receive_from=-1, shape=self.shapes[index])

    def _send_forward(self, out: Tensor) -> None:
        self._exchange(send=out.detach(), send_to=1)

    def _receive_backward(self, out: Tensor) -> Tensor | None:
        return self._exchange(receive_from=1, shape=out.shape)

    def _send_backward(self, grad: Tensor | None) -> None:
        self._exchange(send=grad, send_to=-1)

    def _send_forward_receive_backward(self, sent: Tensor, answered: Tensor) -> Tensor | None:
        return self._exchange(send=sent.detach(), send_to=1, receive_from=1, shape=answered.shape)

    def _send_backward_receive_forward(self, grad: Tensor | None, index: int) -> Tensor | None:
        if index == len(self.shapes):
            self._send_backward(grad)
            return None
        return self._exchange(send=grad, send_to=-1, receive_from=-1, shape=self.shapes[index])

    def _exchange(
        self,
        *,
        send: Tensor | None = None,
        send_to: int = 0,
        receive_from: int = 0,
        shape: Sequence[int] = (),
    ) -> Tensor | None:
        """Send to and receive from neighbours at once, so that two of them never wait for each other's send."""
        operations, received = [], None
        if send is not None and self._has_neighbour(send_to):
            peer = self.meshes.stage_neighbour(send_to)
            operations.append(dist.P2POp(dist.isend, send.contiguous(), peer, self.group))
        if self._has_neighbour(receive_from):
            received = torch.empty(tuple(shape), dtype=self.dtype, device=self.device)
            peer = self.meshes.stage_neighbour(receive_from)
            operations.append(dist.P2POp(dist.irecv, received, peer, self.group))
        for request in dist.batch_isend_irecv(operations) if operations else []:
            request.wait()
        return received

    def _has_neighbour(self, step: int) -> bool:
        return step != 0 and 0 <= self.meshes.pp_rank + step < self.meshes.layout.pp_size


def _backward(received: Tensor | None, out: Tensor, grad: Tensor | None) -> Tensor | None:
    torch.autograd.backward(out, grad)
    return None if received is None else received.grad
