"""How new weights reach SGLang's servers: by disk, as tensors in shared memory, or broadcast over a process group.

The embedded engine samples on the trainer's own parameters and needs none of this.
"""

from __future__ import annotations

from lockstep.weight_sync.broadcast import BroadcastTransport
from lockstep.weight_sync.disk import DiskTransport
from lockstep.weight_sync.source import Transport, WeightSource
from lockstep.weight_sync.tensor import TensorTransport
from lockstep.weight_sync.verify import verify_equal

__all__ = [
    "BroadcastTransport",
    "DiskTransport",
    "TensorTransport",
    "Transport",
    "WeightSource",
    "verify_equal",
]
