"""Which runner computes: the one that works ahead of the host, where there is a GPU with kernels for it."""

from __future__ import annotations

from collections.abc import Sequence as Sizes

from lockstep.exact import is_exact
from lockstep.kernels.fused import is_fused
from lockstep.models import LanguageModel
from lockstep.parallel.decode import Peers
from lockstep.rollout.embedded.ahead import AheadRunner
from lockstep.rollout.embedded.exact import ExactRunner
from lockstep.rollout.embedded.runner import ModelRunner


def make_runner(
    model: LanguageModel,
    *,
    num_blocks: int,
    block_size: int,
    max_running: int,
    peers: Peers | None,
    graph_sizes: Sizes[int] | None,
) -> ModelRunner:
    """`ExactRunner` for a model that computes exactly; else `AheadRunner` for a GPU in bf16, and `ModelRunner` for CPUs
    and fp32."""
    sizes = {"num_blocks": num_blocks, "block_size": block_size, "max_running": max_running}
    if is_exact(model):
        assert peers is None, "ranks that share experts were refused before"
        return ExactRunner(model, **sizes, peers=None, graph_sizes=graph_sizes)
    if is_fused(model.lm_head.weight):
        return AheadRunner(model, **sizes, peers=peers, graph_sizes=graph_sizes)
    return ModelRunner(model, **sizes, peers=peers)
