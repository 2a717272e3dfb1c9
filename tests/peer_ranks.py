"""Two ranks that own half of the experts each and sample together, each with requests of its own or with none."""

from __future__ import annotations

import os
import random
import traceback
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from tiny_models import hf_model, moe_config, random_documents, twin_of
from torch import nn

from lockstep.kernels.address_range import HELD
from lockstep.models import LanguageModel
from lockstep.models.layers.moe import Experts
from lockstep.parallel.collectives import all_gather_together
from lockstep.parallel.decode import Peers, VisitExperts
from lockstep.parallel.mesh import Layout, Meshes
from lockstep.parallel.shard import shard_model
from lockstep.parallel.whole import WholeModel
from lockstep.rollout.embedded import EmbeddedEngine
from lockstep.rollout.embedded.ahead import AheadRunner
from lockstep.rollout.embedded.runner import ModelRunner
from lockstep.rollout.engine import Generation, SamplingParams

NUM_REQUESTS = (17, 3)
"""Of the two ranks: one has nothing left to do long before the other."""
SHAPE: dict[str, Any] = {"num_experts": 8, "moe_intermediate_size": 16}
GPU_SHAPE: dict[str, Any] = SHAPE | {
    "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "num_experts": 16,
    "num_experts_per_tok": 4, "moe_intermediate_size": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One way to sample: which runner, on a GPU with graphs of these sizes, with peers or with all experts."""

    runner: str
    graph_sizes: tuple[int, ...] | None = (3, 8)
    captures: bool = False
    has_peers: bool = True


def run_rank(rank: int, root: Path, device_type: str, ways: list[Way]) -> None:
    """What the rank sampled in every way goes to a file, then what it gathered; or why it did not."""
    torch.set_num_threads(1)
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    patience = timedelta(minutes=4)  # ranks that do not agree wait for each other
    dist.init_process_group(backend, None, patience, 2, rank, dist.FileStore(str(root / "store"), 2))
    try:
        runs = [sampled(way, rank, device) for way in ways]
        found: Any = {
            "exchanged": exchanged(rank),
            "gathered": gathered(device),
            "sampled": [generations for generations, _ in runs],
            "forgotten": [count for _, count in runs],
        }
    except Exception:
        found = traceback.format_exc()
    torch.save(found, root / f"rank_{rank}.pt")
    if isinstance(found, dict):
        dist.barrier()
    os._exit(0)  # taking process groups down aborts now and then, in their own threads


def exchanged(rank: int) -> list[torch.Tensor]:
    """Both ranks' rows of three types, sent together over gloo: what no other type could hold."""
    ids = torch.tensor([[511, 257], [-1, 2**40 + rank]])
    tensors = (torch.full((2, 3), 1.5 + rank).bfloat16(), ids, torch.full((2, 1), 1 / 3 + rank))
    assert dist.group.WORLD is not None
    return all_gather_together(tensors, dist.group.WORLD)


def gathered(device: torch.device) -> dict[str, list[Any]]:
    """Of two times that a divided model's weights were gathered: whether they were its own, where they lay, and the
    bytes that were left of them afterwards."""
    model = random_model(device)
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "experts" not in name}
    shard_model(model, Meshes(Layout(world_size=2), device.type), reduce_dtype=None)
    whole = WholeModel(model, device)
    found: dict[str, list[Any]] = {"equal": [], "addresses": [], "bytes": []}
    others = []
    for _ in range(2):
        with whole.gathered() as together:
            here = {name: p for name, p in together.named_parameters() if name in own}
            found["equal"].append(all(torch.equal(here[name], own[name]) for name in own))
            found["addresses"].append([parameter.data_ptr() for parameter in together.parameters()])
        on_cpu = sum(p.untyped_storage().nbytes() for p in here.values())
        found["bytes"].append(HELD.now if device.type == "cuda" else on_cpu)
        others.append(torch.empty(2**24, dtype=torch.uint8, device=device))  # what training puts there
    return found


def random_model(device: torch.device) -> LanguageModel:
    on_gpu = device.type == "cuda"
    model = twin_of(hf_model(moe_config(0, **(GPU_SHAPE if on_gpu else SHAPE))))
    return model.to(device, torch.bfloat16 if on_gpu else torch.float32)


def sampled(way: Way, rank: int, device: torch.device) -> tuple[list[Generation], int]:
    """Two rollouts, as with weights that were gathered anew in between: the second one's responses, and how often steps
    that were captured were dropped."""
    model = random_model(device)
    peers = share_experts(model, rank) if way.has_peers else None
    engine = EmbeddedEngine(
        model, num_blocks=80, block_size=16, max_running=12, max_prefill_tokens=64, decode_text=lambda ids: "", seed=3,
        peers=peers,
    )  # fmt: skip
    sizes: dict[str, Any] = {"num_blocks": 80, "block_size": 16, "max_running": 12, "peers": peers}
    forgetting: Any = nullcontext()
    if way.runner == "plain":
        engine.runner = ModelRunner(model, **sizes)
    else:
        engine.runner = AheadRunner(model, **sizes, graph_sizes=way.graph_sizes)
        engine.runner.steps._pool = torch.cuda.graph_pool_handle() if way.captures else None
        forgetting = patch.object(engine.runner.steps, "forget", wraps=engine.runner.steps.forget)
    with forgetting as forget:
        first = rollout(engine, peers, rank)
        engine.set_version(1)
        if rank == 0:  # what one rank captured is of no use any more, and the other one does not know
            model.model.norm.weight = nn.Parameter(model.model.norm.weight.detach().clone())
        again = rollout(engine, peers, rank)
    assert [g.token_ids for g in first] == [g.token_ids for g in again]
    return again, 0 if forget is None else forget.call_count


def share_experts(model: LanguageModel, rank: int) -> Peers:
    for experts in (module for module in model.modules() if isinstance(module, Experts)):
        half = len(experts.gate_up_proj) // 2
        for name, parameter in list(experts.named_parameters()):
            part = parameter.detach()[rank * half : (rank + 1) * half].clone()
            experts.register_parameter(name, nn.Parameter(part, requires_grad=False))
        experts.compute = VisitExperts(dist.group.WORLD, rank * half)
    return Peers(model)


def rollout(engine: EmbeddedEngine, peers: Peers | None, rank: int) -> list[Generation]:
    """Requests of ragged lengths; some arrive when others are under way, and one has a longer table than all before."""
    draw = random.Random(rank)
    prompts = random_documents([draw.randrange(2, 90) for _ in range(NUM_REQUESTS[rank])], seed=rank)
    sequences = []
    for number, prompt in enumerate(prompts):
        params = SamplingParams(
            max_new_tokens=1100 if (rank, number) == (0, 1) else draw.randrange(1, 40), stop_token_ids=(5,)
        )
        sequences.append(engine.sequence(prompt, params, (rank, number)))
    late = sequences[1::2]
    for sequence in sequences[::2]:
        engine.add(sequence)
    while late or engine.has_work if peers is None else peers.most(int(bool(late) or engine.has_work))[0]:
        engine.step()
        if late and draw.random() < 0.4:
            engine.add(late.pop())
    engine.blocks.check_integrity()
    return [sequence.generation for sequence in sequences if sequence.generation is not None]
