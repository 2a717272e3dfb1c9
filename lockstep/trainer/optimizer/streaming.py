"""Updates whose state lives in pinned host memory: in to the GPU, one pass of the kernel, and out again.

State goes through device buffers in pieces of some rows of a weight. With overlap there are three streams, so that one
piece comes in while another is updated and a third goes out: the link is busy both ways. Updates go before whatever
else the GPU has to do, or each would wait for the end of a large product; two buffers more make up for those that wait
all the same.

Whoever enqueues waits for a buffer to be free. CUDA would let some thousand operations pile up and then block in the
middle of one, now and then with Python's lock held, while another thread has a forward pass to launch.

Nothing comes in during backward. Without memory of its own that would save the first pieces' way, some
milliseconds a step; and memory that could take more of the state early could keep it for good (`place_state`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lockstep.kernels.adamw import AdamWStep, State, adamw
from lockstep.trainer.optimizer.placement import Layout, layout_bytes

PIECE = 2**25
"""Numbers updated at once: 128 MiB of 8-bit state, long enough to hide the launch of its copies."""

_ALIGNMENT = 256


def piece_bytes(layout: Layout, num_elements: int) -> int:
    """Most bytes of state in one piece of a weight of this many numbers."""
    return math.ceil(layout_bytes(layout) * min(1.0, PIECE / num_elements))


def num_buffers(*, overlaps: bool) -> int:
    """Pieces whose state is on the device at once."""
    return 5 if overlaps else 1


class _Buffer:
    """Device memory for one piece's state, with the events that order its uses."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.arrived, self.updated, self.left = (torch.cuda.Event() for _ in range(3))

    def fill(self, state: State) -> State:
        """Copies of the host tensors, side by side in this buffer."""
        filled, offset = {}, 0
        for name, source in state.items():
            target = self.memory[offset : offset + source.nbytes].view(source.dtype).view(source.shape)
            filled[name] = target.copy_(source, non_blocking=True)
            offset += -(-source.nbytes // _ALIGNMENT) * _ALIGNMENT
        return filled


class StateStream:
    """Runs updates of weights on `device` whose state is in pinned host memory.

    Args:
        piece_bytes: most bytes of state that a piece can have.
        overlap: copy in, update and copy out at the same time, on streams of their own.
    """

    def __init__(self, device: torch.device, piece_bytes: int, *, overlap: bool) -> None:
        current = torch.cuda.current_stream(device)
        self._overlap = overlap
        streams = (torch.cuda.Stream(device, priority=-1) if overlap else current for _ in range(3))
        self._in, self._compute, self._out = streams
        size = piece_bytes + 8 * _ALIGNMENT
        self._buffers = [_Buffer(size, device) for _ in range(num_buffers(overlaps=overlap))]
        self._num_pieces = 0
        self._updated: dict[str, torch.cuda.Event] = {}
        self._in.wait_stream(current)  # the buffers' memory may still be in use there

    def begin(self) -> None:
        """Call before the updates of a step: they follow what the current stream does, and the last step's copies."""
        if self._overlap:
            self._compute.wait_stream(torch.cuda.current_stream())
            self._in.wait_stream(self._out)

    def update(self, name: str, weight_RD: Tensor, grad_RD: Tensor, state: State, step: AdamWStep) -> None:
        """Enqueue the update of one weight; it returns before the GPU has begun.

        Args:
            state: pinned host tensors, rewritten in place once `synchronize` has returned.
        """
        width = weight_RD.shape[1]
        rows = max(1, PIECE // width)
        for start in range(0, weight_RD.shape[0], rows):
            part = slice(start, start + rows)
            on_host = {key: tensor[part] for key, tensor in state.items()}
            self._update_piece(weight_RD[part], grad_RD[part], on_host, step, start * width)
        if self._overlap:
            grad_RD.record_stream(self._compute)
            self._updated[name] = self._compute.record_event()

    def _update_piece(
        self, weight_RD: Tensor, grad_RD: Tensor, on_host: State, step: AdamWStep, first_element: int
    ) -> None:
        buffer = self._buffers[self._num_pieces % len(self._buffers)]
        self._num_pieces += 1
        if self._overlap:
            buffer.left.synchronize()  # without overlap one stream does one thing after the other
        with torch.cuda.stream(self._in):
            state = buffer.fill(on_host)
            buffer.arrived.record()
        with torch.cuda.stream(self._compute):
            self._compute.wait_event(buffer.arrived)
            adamw(weight_RD, grad_RD, state, step, first_element=first_element)
            buffer.updated.record()
        with torch.cuda.stream(self._out):
            self._out.wait_event(buffer.updated)
            for key, tensor in state.items():
                on_host[key].copy_(tensor, non_blocking=True)
            buffer.left.record()

    def wait(self, name: str) -> None:
        """Let what the current stream does next see the weight's update."""
        if name in self._updated:
            torch.cuda.current_stream().wait_event(self._updated[name])

    def synchronize(self) -> None:
        """Block until the host tensors are up to date."""
        self._out.synchronize()
