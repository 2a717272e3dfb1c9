"""AdamW with exact clipping, whose state is as small as its options ask and lives where they say."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from lockstep.config import OptimizerOptions
from lockstep.kernels.adamw import AdamWStep, State, adamw
from lockstep.trainer.optimizer.gradients import Gradients
from lockstep.trainer.optimizer.host_memory import PinnedMemory, require_host_memory
from lockstep.trainer.optimizer.placement import Layout, layout_bytes, place_state
from lockstep.trainer.optimizer.streaming import StateStream, piece_bytes

_FORMATS = {torch.bfloat16: "_bf16", torch.int8: "_8bit", torch.uint8: "_8bit"}
"""What a saved moment's name says of its format."""


class Optimizer:
    """Updates a model's parameters from the gradients that backward leaves.

    All masters are fp32: an fp32 parameter is its own, a bf16 parameter has the missing bits in the state. Weight decay
    is decoupled and spares vectors (norms and biases), as in Megatron. Nothing changes before the gradient's norm is
    known and finite.

    Args:
        settles: backward completes one layer's gradients after the other and tells `gradients.settle`. They then add
            up in fp32 whatever `main_grads_dtype` says, which is how they are kept.

    Raises:
        OptionError: the state to be offloaded does not fit into host memory.
    """

    def __init__(self, model: nn.Module, options: OptimizerOptions, *, settles: bool = False) -> None:
        self.options = options
        self.parameters = dict(model.named_parameters())
        main_grads = torch.bfloat16 if options.main_grads_dtype == "bf16" else torch.float32
        accumulate = torch.float32 if settles else main_grads
        self.gradients = Gradients(self.parameters, accumulate=accumulate, keep=main_grads)
        self.num_updates = 0
        self._step = torch.zeros((), dtype=torch.int64)
        self._placement = place_state(self.parameters, options)
        self._stream: StateStream | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._enqueued: dict[str, Future[None]] = {}
        self._states = self._allocate()

    def step(self, lr: float) -> float:
        """Clip by the global norm, update, clear the gradients; returns the norm before clipping.

        When the norm is not finite nothing changes but the gradients, which are cleared: the caller sees the norm.
        """
        grad_norm = self.start_step(lr)
        self.wait(self.parameters)
        return grad_norm

    @torch.no_grad()
    def start_step(self, lr: float) -> float:
        """As `step`, but streamed updates may still be under way: call `wait` before using a parameter.

        A gradient's memory is free as soon as its parameter is updated.
        """
        grad_norm = self.gradients.norm()
        if math.isfinite(grad_norm):
            self._step += 1
            self.num_updates += 1
            self._start_updates(lr, self._clipping(grad_norm))
        else:
            self.gradients.clear()
        return grad_norm

    @property
    def is_streamed(self) -> bool:
        """Whether `start_step` may return before its updates are done."""
        return self._stream is not None

    def wait(self, names: Iterable[str]) -> None:
        """Let what the current stream does next see these parameters' updates."""
        if self._stream is not None:
            for name in names:
                if (enqueued := self._enqueued.pop(name, None)) is not None:
                    enqueued.result()
                self._stream.wait(name)

    def synchronize(self) -> None:
        """Block until every update is done: gradients are free, and state in host memory is up to date."""
        if self._stream is not None:
            self.wait(self.parameters)
            self._stream.synchronize()

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that a checkpoint must hold beside the weights, itself and not a copy.

        Names tell the format, so that a checkpoint of other moments is refused and not misread.
        """
        self.synchronize()
        yield "step", self._step
        for name, state in self._states.items():
            for key, tensor in state.items():
                yield f"{key}{_FORMATS.get(tensor.dtype, '')}.{name}", tensor

    @torch.no_grad()
    def restart(self) -> None:
        """Forget the moments and take the parameters as they are now."""
        for _, tensor in self.named_state():
            tensor.zero_()

    def _clipping(self, grad_norm: float) -> float:
        return self.options.clip_grad / (grad_norm + 1e-6) if 0 < self.options.clip_grad < grad_norm else 1.0

    def _start_updates(self, lr: float, grad_scale: float) -> None:
        """All weights in the model's order. Streamed with overlap they are enqueued by a thread, because CUDA lets a
        stream fall behind by some thousand operations only and then blocks who enqueues more."""
        if self._stream is not None:
            self._stream.begin()
        for name in self.parameters:
            if self._thread is None:
                self._update(name, lr, grad_scale)
            else:
                self._enqueued[name] = self._thread.submit(self._update, name, lr, grad_scale)

    @torch.no_grad()
    def _update(self, name: str, lr: float, grad_scale: float) -> None:
        grad = self.gradients.take(name)
        if grad is None:
            return
        parameter, options, number = self.parameters[name], self.options, int(self._step)
        step = AdamWStep(
            lr=lr,
            beta1=options.adam_beta1,
            beta2=options.adam_beta2,
            eps=options.adam_eps,
            weight_decay=options.weight_decay if parameter.dim() > 1 else 0.0,
            step=number,
            grad_scale=grad_scale,
            seed=zlib.crc32(f"{options.seed} {number} {name}".encode()),
        )
        weight_RD, grad_RD = _rows(parameter.detach()), _rows(grad)
        state = {key: _rows(tensor) for key, tensor in self._states[name].items()}
        if self._stream is not None and name in self._placement.on_host:
            self._stream.update(name, weight_RD, grad_RD, state, step)
        else:
            adamw(weight_RD, grad_RD, state, step)

    def _allocate(self) -> dict[str, State]:
        layouts, devices = self._placement.layouts, {name: p.device for name, p in self.parameters.items()}
        on_host = {name: layouts[name] for name in self._placement.on_host if devices[name].type == "cuda"}
        self._require_host_memory(sum(layout_bytes(layout) for layout in on_host.values()))
        pinned = self._pin(on_host) if on_host else {}
        return {name: pinned.get(name) or _zeros(layout, devices[name]) for name, layout in layouts.items()}

    def _require_host_memory(self, needed: int) -> None:
        if needed:
            require_host_memory(needed)

    def _pin(self, layouts: dict[str, Layout]) -> dict[str, State]:
        device = next(self.parameters[name].device for name in layouts)
        self._pinned = PinnedMemory((entry for layout in layouts.values() for entry in layout.values()), device)
        largest = max(piece_bytes(layout, self.parameters[name].numel()) for name, layout in layouts.items())
        self._stream = StateStream(device, largest, overlap=self.options.overlap_cpu_optimizer_d2h_h2d)
        if self.options.overlap_cpu_optimizer_d2h_h2d:
            self._thread = ThreadPoolExecutor(1, "updates", torch.cuda.set_device, (device,))
        tensors = iter(self._pinned.tensors)
        return {name: {key: next(tensors) for key in layout} for name, layout in layouts.items()}


def _zeros(layout: Layout, device: torch.device) -> State:
    return {key: torch.zeros(shape, dtype=dtype, device=device) for key, (shape, dtype) in layout.items()}


def _rows(tensor: Tensor) -> Tensor:
    """`[..., D]` as `[R, D]`, the same memory."""
    return tensor.view(-1, tensor.shape[-1])
