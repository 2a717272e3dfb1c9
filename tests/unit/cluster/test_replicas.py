"""Real replicas in processes of their own, and weights that change while they sample."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from e2e_runs import write_model
from torch import distributed as dist

from lockstep.checkpoint.hf import load_hf_model
from lockstep.cluster.engines import ReplicaEngine
from lockstep.cluster.executor import LocalProcesses
from lockstep.cluster.group import WorkerGroup
from lockstep.cluster.replica import Replica, ReplicaPlan
from lockstep.config import Config
from lockstep.kernels.linear_log_probs import linear_log_probs
from lockstep.kernels.packed import PackedDocuments
from lockstep.models import LanguageModel
from lockstep.rollout.engine import Generation, SamplingParams
from lockstep.weight_sync.copies import CopySender, copies_group

TOLERANCE = 1e-4
"""fp32 log-probs around -5 by two orders of summation; other weights differ by 0.01 and more (asserted)."""
PROMPT = [5, 6, 7, 8, 9]
LENGTH = 100


class Served:
    """Two replicas, and the two models whose weights they get in turn."""

    def __init__(self, folder: Path) -> None:
        first, second = (write_model(folder / name, seed) for seed, name in enumerate(("first", "second")))
        self.models = [load_hf_model(path, dtype=torch.float32, device="cpu") for path in (first, second)]
        config = Config.from_dict({"hf_checkpoint": str(first), "params_dtype": "float32", "num_threads": 1})
        self.group = WorkerGroup(
            2, Replica, (ReplicaPlan(config, "cpu"),), timeout_s=120.0, executor=LocalProcesses(what="replica")
        )
        self.group.wait_for_start()
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        address = "127.0.0.1", self.store.port
        joining = self.group.begin("open_copies", address)
        self.sender = CopySender(copies_group(config, torch.device("cpu"), address, 0, 3))
        self.group.finish(joining)
        self.group.call("open_engine", 1024, 128)
        self.engine = ReplicaEngine(self.group, self.send)
        self.version = -1

    def send(self) -> None:
        self.sender.send(self.models[self.version % 2].named_parameters())

    def give(self, version: int) -> None:
        self.version = version
        self.engine.set_version(version)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        served = Served(tmp_path_factory.mktemp("models"))
    yield served
    served.group.close()


def log_probs(model: LanguageModel, tokens: list[int]) -> torch.Tensor:
    """Of every token but the first, by one forward pass."""
    tokens_T = torch.tensor(tokens)
    with torch.no_grad():
        documents = PackedDocuments([len(tokens)], torch.device("cpu"))
        hidden_TD = model(tokens_T, torch.arange(len(tokens)), documents)
        return linear_log_probs(hidden_TD[:-1], model.lm_head.weight, tokens_T[1:], temperature=1.0)[0]


async def interrupted(served: Served, updates: int) -> tuple[list[Generation], list[Generation]]:
    """Responses during which the weights change: two that sample from all tokens, and two from a nucleus."""
    served.give(served.version + 1)
    params = SamplingParams(LENGTH, min_new_tokens=LENGTH), SamplingParams(LENGTH, min_new_tokens=LENGTH, top_p=0.9)
    generate = served.engine.generate
    tasks = [asyncio.create_task(generate(PROMPT, params[g], (0, 0, g, s))) for g in (0, 1) for s in (0, 1)]
    for _ in range(updates):
        await asyncio.sleep(0.05)
        served.give(served.version + 1)
    responses = list(await asyncio.gather(*tasks))
    await served.engine.drain()
    return responses[:2], responses[2:]


def test_every_token_carries_the_version_that_it_was_sampled_with(served: Served) -> None:
    """Its log-prob is the one of these weights, after a prefix that was partly written by others."""
    for _ in range(20):  # until an update has come in the middle, which the clock decides
        free, cut = asyncio.run(interrupted(served, updates=2))
        if all(any(len(set(r.weight_versions)) > 1 for r in responses) for responses in (free, cut)):
            break
    assert any(len(set(response.weight_versions)) > 1 for response in free)
    assert any(len(set(response.weight_versions)) > 1 for response in cut)
    for response in free:
        assert len(response.token_ids) == LENGTH
        of_models = [log_probs(model, PROMPT + response.token_ids)[len(PROMPT) - 1 :] for model in served.models]
        versions = torch.tensor([int(version) for version in response.weight_versions])
        assert versions.tolist() == sorted(versions.tolist())
        expected = torch.where(versions % 2 == 0, *of_models)
        torch.testing.assert_close(torch.tensor(response.log_probs), expected, atol=TOLERANCE, rtol=0)
        assert (of_models[0] - of_models[1]).abs().mean() > 0.01, "the test could not tell the weights apart"
    for response in cut:
        assert len(response.token_ids) == len(response.log_probs) == len(response.weight_versions) == LENGTH
        kept, offsets = response.kept_token_ids, response.kept_token_offsets
        assert kept is not None
        assert offsets is not None
        assert offsets[-1] == len(kept)
        nuclei = [kept[begin:end] for begin, end in pairwise(offsets)]
        assert len(nuclei) == LENGTH
        assert all(token in nucleus for token, nucleus in zip(response.token_ids, nuclei, strict=True))
        assert response.routed_experts is not None
        assert len(response.routed_experts) == len(PROMPT) + LENGTH - 1
