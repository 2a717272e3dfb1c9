"""In every layout, several processes train as one does, and go on from the checkpoint of any other layout."""

from __future__ import annotations

import copy
import json
import multiprocessing
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_ranks import Case, Expected, error_of, masters_of, one_process, run_rank, run_rank_in_small_formats
from tiny_models import dense_config, hf_model, moe_config, next_config, relative_error, twin_of
from torch.multiprocessing import start_processes
from transformers import PretrainedConfig

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
        "routing": ("own", "own"),
        "batching": {"max_tokens_per_gpu": 40},
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
            moe_intermediate_size=16,
            mlp_only_layers=[1],
            attention_bias=False,
            tie_word_embeddings=False,
        ),
        "estimator": "grpo",
        "routing": ("own", "rollout"),
        "batching": {"max_tokens_per_gpu": 40},
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
            moe_intermediate_size=16,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            shared_expert_intermediate_size=16,
            attention_bias=False,
            tie_word_embeddings=False,
        ),
        "estimator": "gspo",
        "routing": ("old", "old"),
        "batching": {"max_tokens_per_gpu": 40, "recompute_granularity": "full"},
        "tolerance": 5e-5,
    },
}

LAYOUTS: dict[int, list[dict[str, int]]] = {
    2: [{}, {"ep_size": 2}, {"etp_size": 2}, {"tp_size": 2}, {"cp_size": 2}, {"pp_size": 2}],
    4: [
        {"tp_size": 4},  # more ranks than key/value heads
        {"cp_size": 4, "ep_size": 2},
        {"tp_size": 2, "cp_size": 2, "ep_size": 2},
        {"tp_size": 2, "ep_size": 2, "etp_size": 2},
        {"pp_size": 2, "ep_size": 2},
        {"pp_size": 4},
    ],
    8: [
        {"tp_size": 2, "cp_size": 2, "ep_size": 8},
        {"pp_size": 2, "tp_size": 2, "cp_size": 2, "ep_size": 2},
        {"pp_size": 2, "cp_size": 2, "ep_size": 2, "etp_size": 2},
    ],
}

NUM_LAYERS = {2: 3, 4: 5, 8: 3}
"""By the number of ranks: as many as stages of unlike sizes need, and at most all."""


def batch(seed: int) -> list[TrainSample]:
    """Ragged samples; one is longer than a micro-batch, some have a nucleus, one is masked."""
    draw = random.Random(seed)
    samples = []
    for number in range(7):
        prompt, response = draw.randrange(2, 8), 90 if number == 3 else draw.randrange(2, 30)
        tokens = [draw.randrange(VOCAB) for _ in range(prompt + response)]
        sample = TrainSample(tokens, response, [int(number != 2 or i % 3 > 0) for i in range(response)])
        sample.loss_weight = 1 / sum(sample.loss_mask) / 7
        sample.advantage = draw.uniform(-1.5, 1.5)
        if number % 3 == 1:
            kept = [sorted({token, *draw.sample(range(VOCAB), 11)}) for token in tokens[-response:]]
            sample.kept_token_ids = [token for row in kept for token in row]
            sample.kept_token_offsets = [sum(len(row) for row in kept[:i]) for i in range(response + 1)]
        samples.append(sample)
    return samples


def first_layers(config: PretrainedConfig, count: int) -> PretrainedConfig:
    config = copy.deepcopy(config)
    config.num_hidden_layers = min(count, config.num_hidden_layers)
    if hasattr(config, "layer_types"):
        config.layer_types = config.layer_types[:count]
    return config


def make_case(family: str, root: Path, num_layers: int = 5) -> Case:
    """One process's own two steps, off policy enough for some ratios to be clipped, and its checkpoint between them."""
    settings = FAMILIES[family]
    config = first_layers(settings["config"], num_layers)
    model = twin_of(hf_model(config))
    case = Case(
        hf_config=config.to_dict(),
        weights={name: tensor.clone() for name, tensor in model.state_dict().items()},
        estimator=settings["estimator"],
        routing=settings["routing"],
        batching=settings["batching"],
        batches=[batch(seed) for seed in (1, 2)],
        expected=[],
        tolerance=settings["tolerance"],
    )
    trainer = LocalTrainer(model, **case.trainer_options())
    noise = torch.Generator().manual_seed(3)
    for samples in case.batches:
        add_routes(samples, case)
        for sample, now in zip(samples, trainer.log_probs(copy.deepcopy(samples)), strict=True):
            shape = (2, sample.response_length)
            moved = 0.3 * torch.randn(shape, generator=noise) + 0.4 * torch.randn(2, 1, generator=noise)
            sample.old_log_probs, sample.ref_log_probs = now.log_probs + moved
    first, second = case.batches_for(trainer)
    case.expected.append(take_step(trainer, first))
    folder = root / one_process(family)
    folder.mkdir()
    trainer.save(folder)
    if "old" in case.routing:
        now = copy.deepcopy(case.batches[1])
        trainer.log_probs(now)
        moved = [(a.routed_experts != b.routed_experts).any() for a, b in zip(now, second, strict=True)]
        assert any(moved), "the update must change some token's experts, or replaying them changes nothing"
    own = trainer.log_probs(copy.deepcopy(second))
    trainer.routing = case.routing[1]
    if case.routing[1] == "rollout":
        pairs = zip(trainer.log_probs(second), own, strict=True)
        assert any((a.log_probs - b.log_probs).abs().max() > 0.01 for a, b in pairs), "replayed experts must matter"
    case.expected.append(take_step(trainer, second))
    for expected in case.expected:
        assert 0 < expected.metrics["train/pg_clipfrac"] < 1, "some ratios must be clipped, and others not"
    return case


def add_routes(samples: list[TrainSample], case: Case) -> None:
    """Recorded routes for every other sample: the router's own, but for one token."""
    draw, recorded = random.Random(4), copy.deepcopy(samples)
    LocalTrainer(case.model(), **case.trainer_options() | {"routing": "old"}).log_probs(recorded)
    for sample, known in zip(samples[1::2], recorded[1::2], strict=True):
        if known.routed_experts is not None:
            sample.routed_experts = known.routed_experts[:-1].copy()
            row = sample.routed_experts[draw.randrange(len(sample.routed_experts)), -1]
            row[:] = (row + 1) % 8


def take_step(trainer: LocalTrainer, samples: list[TrainSample]) -> Expected:
    result = trainer.step(samples)
    weights = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    return Expected(result.metrics, result.policy, weights)


def launch(run: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """Processes forked from one that has imported torch, which takes longer than most of what they do."""
    multiprocessing.set_forkserver_preload(["lockstep.trainer.parallel"])
    start_processes(run, args=(world_size, *arguments), nprocs=world_size, start_method="forkserver")


def reports_of(world_size: int, root: Path) -> list[dict[str, Any]]:
    return [json.loads((root / f"rank_{rank}.json").read_text()) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_every_layout_trains_as_one_process_does(tmp_path: Path, world_size: int) -> None:
    """A second step starts from the checkpoint of the layout before it; the first and the last are of one process."""
    cases = {family: make_case(family, tmp_path, NUM_LAYERS[world_size]) for family in FAMILIES}
    for family, case in cases.items():
        torch.save(case, tmp_path / f"{family}.case")
    launch(run_rank, world_size, LAYOUTS[world_size], tmp_path)
    reports = reports_of(world_size, tmp_path)
    problems = [f"rank {rank}: {problem}" for rank, report in enumerate(reports) for problem in report["problems"]]
    assert not problems, "\n".join(problems)

    for family, case in cases.items():
        trainer = LocalTrainer(case.model(), **case.trainer_options() | {"routing": case.routing[1]})
        batches = case.batches_for(trainer)
        trainer.load(tmp_path / reports[0]["last"][family])
        found = take_step(trainer, batches[1])
        wanted = case.expected[1]
        worst = max(relative_error(found.weights[name], weight) for name, weight in wanted.weights.items())
        assert worst <= case.tolerance, family


def test_small_formats_references_and_broken_steps_are_shared_by_all_ranks(tmp_path: Path) -> None:
    """Log-probs before and after an update are as near to fp32's as one process's bf16 comes."""
    own_errors = {}
    for family in ("dense", "moe"):
        case = make_case(family, tmp_path)
        torch.save(case, tmp_path / f"{family}.case")
        trainer = LocalTrainer(case.model().bfloat16(), **case.trainer_options())
        results = [trainer.step(samples) for samples in case.batches_for(trainer)]
        own_errors[family] = [error_of(*pair) for pair in zip(results, case.expected, strict=True)]
    case = torch.load(tmp_path / "dense.case", weights_only=False)
    options = case.trainer_options() | {"batching": case.batching_options(backward_order="layer")}
    trainer = LocalTrainer(case.model().bfloat16(), **options)
    norm = trainer.step(case.batches[0]).metrics["train/grad_norm"]
    weights = {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}
    torch.save({"norm": norm, "masters": masters_of(weights, trainer.optimizer)}, tmp_path / "by_layer.pt")
    launch(run_rank_in_small_formats, 2, tmp_path)
    for report in reports_of(2, tmp_path):
        for name, errors in report["errors"].items():
            for error, own in zip(errors, own_errors[name.split()[0]], strict=True):
                assert error < 1.5 * own, name
        assert report["is_equal"], "in the layout that wrote it, a checkpoint is read back bit for bit"
        # Half of a row of 40 is less than a block of 128.
        assert "mlp.down_proj.weight is 'cut over 2 ranks'" in report["refusal"]
        assert report["reference_is_frozen"]
        assert report["reference_moved"]
        assert not report["policy_is_unchanged"], "else the reference would be frozen whatever it is"
        # A micro-batch's bf16 gradients are one process's, and all their sums are fp32: a few roundings of 6e-8 each.
        assert abs(report["by_layer_norm"] - 1) < 1e-6
        assert report["by_layer_error"] < 1e-6
        assert report["num_micro_batches"] > 1
        assert report["gathers"] == 2 * case.model().config.num_hidden_layers + 1, "and once what is outside layers"
        enough, twice_too_much, one_has_it_all = report["host_memory"]
        assert enough is None
        assert one_has_it_all is None
        assert "--optimizer-cpu-offload" in twice_too_much, "either rank alone could have its 60 %"
        assert "for the 2 ranks of a machine" in twice_too_much
        assert len(report["broken"]) == 6
        for name, problems in report["broken"].items():
            assert problems == [], f"{name}: when one rank's gradient is not finite, no rank changes a number"
