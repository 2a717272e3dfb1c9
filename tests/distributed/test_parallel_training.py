"""In every layout, several processes train as one does, and go on from the checkpoint of any other layout."""

from __future__ import annotations

import copy
import json
import multiprocessing
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_ranks import Case, Expected, one_process, run_rank
from tiny_models import dense_config, hf_model, moe_config, next_config, relative_error, twin_of
from torch.multiprocessing import start_processes

from lockstep.trainer.batch import TrainSample
from lockstep.trainer.local import LocalTrainer

VOCAB = 96
COMMON = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}

FAMILIES: dict[str, dict[str, Any]] = {
    "dense": {
        "config": dense_config(
            0, **COMMON, num_hidden_layers=5, intermediate_size=40, attention_bias=True, tie_word_embeddings=True
        ),
        "estimator": "gspo",
        "routing": "own",
        "batching": {"max_tokens_per_gpu": 96},
        "tolerance": 1e-6,
    },
    "moe": {
        "config": moe_config(
            1,
            **COMMON,
            num_hidden_layers=5,
            intermediate_size=40,
            num_experts=8,
            num_experts_per_tok=3,
            mlp_only_layers=[1],
            attention_bias=False,
            tie_word_embeddings=False,
        ),
        "estimator": "grpo",
        "routing": "rollout",
        "batching": {"max_tokens_per_gpu": 64},
        "tolerance": 1e-6,
    },
    "next": {
        "config": next_config(
            0,
            **COMMON,
            num_hidden_layers=4,
            layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention"],
            linear_conv_kernel_dim=4,
            linear_num_key_heads=4,
            linear_num_value_heads=8,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=8,
            num_experts_per_tok=2,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            shared_expert_intermediate_size=16,
            attention_bias=False,
            tie_word_embeddings=False,
        ),
        "estimator": "gspo",
        "routing": "old",
        "batching": {"max_tokens_per_gpu": 64, "recompute_granularity": "full"},
        "tolerance": 5e-5,
    },
}

LAYOUTS: dict[int, list[dict[str, int]]] = {
    2: [{}, {"ep_size": 2}, {"tp_size": 2}, {"cp_size": 2}, {"pp_size": 2}],
    4: [
        {"tp_size": 4},  # more ranks than key/value heads
        {"cp_size": 4, "ep_size": 2},
        {"tp_size": 2, "cp_size": 2, "ep_size": 2},
        {"tp_size": 2, "ep_size": 4},
        {"pp_size": 2, "ep_size": 2},
        {"pp_size": 4},
    ],
    8: [
        {"tp_size": 2, "cp_size": 2, "ep_size": 4},
        {"tp_size": 4, "ep_size": 8},
        {"pp_size": 2, "tp_size": 2, "cp_size": 2, "ep_size": 2},
        {"pp_size": 2, "cp_size": 2, "ep_size": 4},
    ],
}


def batch(seed: int, *, num_layers: int, num_experts: int, slots: int) -> list[TrainSample]:
    """Ragged samples; one is longer than a micro-batch, some have a nucleus, some recorded routes, one is masked."""
    draw = random.Random(seed)
    samples = []
    for number in range(9):
        prompt, response = draw.randrange(2, 8), 90 if number == 4 else draw.randrange(2, 30)
        tokens = [draw.randrange(VOCAB) for _ in range(prompt + response)]
        sample = TrainSample(tokens, response, [int(number != 2 or i % 3 > 0) for i in range(response)])
        sample.loss_weight = 1 / sum(sample.loss_mask) / 9
        sample.advantage = draw.uniform(-1.5, 1.5)
        if number % 3 == 1:
            kept = [sorted({token, *draw.sample(range(VOCAB), 11)}) for token in tokens[-response:]]
            sample.kept_token_ids = [token for row in kept for token in row]
            sample.kept_token_offsets = [sum(len(row) for row in kept[:i]) for i in range(response + 1)]
        if num_layers and number % 2:
            rows = [
                [draw.sample(range(num_experts), slots) for _ in range(num_layers)]
                for _ in range(prompt + response - 1)
            ]
            sample.routed_experts = torch.tensor(rows).numpy()
        samples.append(sample)
    return samples


def make_case(family: str, root: Path) -> Case:
    """One process's own two steps, off policy enough for some ratios to be clipped, and its checkpoint between them."""
    settings = FAMILIES[family]
    model = twin_of(hf_model(settings["config"]))
    config = model.config
    sparse = {
        "num_layers": config.num_sparse_layers,
        "num_experts": config.num_experts,
        "slots": config.num_experts_per_tok,
    }
    case = Case(
        hf_config=settings["config"].to_dict(),
        weights={name: tensor.clone() for name, tensor in model.state_dict().items()},
        estimator=settings["estimator"],
        routing=settings["routing"],
        batching=settings["batching"],
        batches=[batch(seed, **sparse) for seed in (1, 2)],
        expected=[],
        tolerance=settings["tolerance"],
    )
    trainer = LocalTrainer(model, **case.trainer_options())
    noise = torch.Generator().manual_seed(3)
    for samples in case.batches:
        for sample, now in zip(samples, trainer.log_probs(copy.deepcopy(samples)), strict=True):
            moved = 0.3 * torch.randn(2, sample.response_length, generator=noise) + 0.4 * torch.randn(
                2, 1, generator=noise
            )
            sample.old_log_probs, sample.ref_log_probs = now.log_probs + moved
    for samples in case.batches:
        case.expected.append(take_step(trainer, case, samples))
        assert 0 < case.expected[-1].metrics["train/pg_clipfrac"] < 1, "some ratios must be clipped, and others not"
        folder = root / one_process(family)
        if not folder.exists():
            folder.mkdir()
            trainer.save(folder)
    return case


def take_step(trainer: LocalTrainer, case: Case, samples: list[TrainSample]) -> Expected:
    samples = copy.deepcopy(samples)
    if case.routing == "old":
        trainer.log_probs(samples)
    result = trainer.step(samples)
    weights = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    return Expected(result.metrics, result.policy, weights)


def launch(world_size: int, layouts: list[dict[str, int]], root: Path) -> None:
    """Processes forked from one that has imported torch, which takes longer than most of what they do."""
    multiprocessing.set_forkserver_preload(["lockstep.trainer.parallel"])
    start_processes(run_rank, args=(world_size, layouts, root), nprocs=world_size, start_method="forkserver")


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_every_layout_trains_as_one_process_does(tmp_path: Path, world_size: int) -> None:
    """Each layout takes its second step from the checkpoint of the one before; the first and the last are one process's."""
    cases = {family: make_case(family, tmp_path) for family in FAMILIES}
    for family, case in cases.items():
        torch.save(case, tmp_path / f"{family}.case")
    launch(world_size, LAYOUTS[world_size], tmp_path)
    reports = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(world_size)]
    problems = [f"rank {rank}: {problem}" for rank, report in enumerate(reports) for problem in report["problems"]]
    assert not problems, "\n".join(problems)

    for family, case in cases.items():
        trainer = LocalTrainer(case.model(), **case.trainer_options())
        trainer.load(tmp_path / reports[0]["last"][family])
        found = take_step(trainer, case, case.batches[1])
        wanted = case.expected[1]
        worst = max(relative_error(found.weights[name], weight) for name, weight in wanted.weights.items())
        assert worst <= case.tolerance, family
