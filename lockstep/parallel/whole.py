"""What every rank samples with: all dense weights, gathered while it samples, and the experts that it owns anyway.

Attention is data-parallel: each rank has its own sequences. Experts stay where they are, so a rank's rows visit all of
them; see `decode.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lockstep.errors import RolloutError
from lockstep.kernels.address_range import NoPagesLeft, tensors_in_range
from lockstep.models import LanguageModel, build_model
from lockstep.models.layers.moe import Experts
from lockstep.parallel.decode import VisitExperts


class WholeModel:
    """A model of one device whose dense weights have memory only while they are gathered.

    The model and its parameters stay the same objects, so that whoever decodes on it may keep it; on a GPU they keep
    their addresses too, and graphs that were captured with them go on.

    Args:
        sharded: a model whose every parameter is a DTensor, on ranks that hold all layers between them. Its experts are
            divided along the expert dim alone.
    """

    def __init__(self, sharded: LanguageModel, device: torch.device) -> None:
        self._stored = dict(sharded.named_parameters())
        dtype = next(iter(self._stored.values())).dtype
        with torch.device("meta"):
            self.model = build_model(sharded.config).to(dtype)
        for prefix, module in self.model.named_modules():
            if isinstance(module, Experts):
                for name, _ in list(module.named_parameters()):
                    module.register_parameter(name, _fixed(self._local(f"{prefix}.{name}")))
                first = _first_expert(self._stored[f"{prefix}.gate_up_proj"])
                module.compute = VisitExperts(dist.group.WORLD, first)
        dense = [(name, p) for name, p in self.model.named_parameters() if p.is_meta and name in self._stored]
        with _room():
            self._memory, tensors = tensors_in_range([(p.shape, dtype) for _, p in dense], device)
        self._dense = {name: _fixed(tensor) for (name, _), tensor in zip(dense, tensors, strict=True)}
        for name, parameter in self._dense.items():
            prefix, _, own_name = name.rpartition(".")
            self.model.get_submodule(prefix).register_parameter(own_name, parameter)
        self.model.tie_weights()
        self._drop()

    @contextmanager
    def gathered(self) -> Iterator[LanguageModel]:
        """Called by all ranks; one parameter at a time crosses between them."""
        try:
            with torch.no_grad():
                self._hold()
                for name, parameter in self._dense.items():
                    parameter.copy_(whole(self._stored[name]))
            self._require_one_copy()
            yield self.model
        finally:
            self._drop()

    def _local(self, name: str) -> Tensor:
        stored = self._stored[name]
        assert isinstance(stored, DTensor), f"{name} was not sharded"
        return stored.to_local().detach()

    def _require_one_copy(self) -> None:
        """The sampler's experts are the trainer's, in the same memory."""
        for prefix, module in self.model.named_modules():
            if isinstance(module, Experts):
                for name, parameter in module.named_parameters(recurse=False):
                    ours = self._local(f"{prefix}.{name}")
                    assert parameter.data_ptr() == ours.data_ptr(), f"{prefix}.{name} has moved"
                    assert parameter.shape == ours.shape, f"{prefix}.{name} was divided otherwise"

    def _hold(self) -> None:
        if self._memory.can_release:
            with _room():
                self._memory.hold()
        else:
            self._memory.data.untyped_storage().resize_(self._memory.data.nbytes)

    def _drop(self) -> None:
        if self._memory.can_release:
            self._memory.release()
        else:
            self._memory.data.untyped_storage().resize_(0)


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except NoPagesLeft as error:
        raise RolloutError(
            "--actor-num-gpus-per-node",
            dist.get_world_size(),
            f"to sample, every GPU needs all dense weights, {error.wanted / 2**30:.1f} GiB, and has "
            f"{error.left / 2**30:.1f} GiB left.",
            "Use more GPUs, --optimizer-cpu-offload, or --rollout-engine sglang.",
        ) from error


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def whole(stored: Tensor) -> Tensor:
    """A sharded parameter, gathered. Called by all ranks."""
    assert isinstance(stored, DTensor), "a sharded model has nothing but DTensors"
    gathered: Tensor = stored.full_tensor()
    return gathered.detach()


def _first_expert(stored: Tensor) -> int:
    """Of those that this rank owns, which follow each other; 0 where it owns none."""
    assert isinstance(stored, DTensor), "a sharded model has nothing but DTensors"
    chunks = stored.__create_chunk_list__()  # the question that torch's own checkpoints ask
    return int(chunks[0].offsets[0]) if chunks else 0
