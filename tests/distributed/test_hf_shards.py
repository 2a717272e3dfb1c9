"""Several processes load an HF folder together, each its own part, and write it back together."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_ranks import DRAWN, FULL, run_rank
from safetensors.torch import load_file, save_file
from tiny_models import hf_model, moe_config, next_config
from torch import Tensor
from torch.multiprocessing import spawn
from transformers import PretrainedConfig
from transformers.utils import logging

from lockstep.checkpoint.hf import fill_with_dummies, load_hf_model

MOE = {"num_experts": 8, "num_hidden_layers": 2, "mlp_only_layers": [1], "decoder_sparse_step": 1}
CONFIGS = {
    "moe": moe_config(1, tie_word_embeddings=False, **MOE),
    "tied": moe_config(1, tie_word_embeddings=True, **MOE),
    "next": next_config(1, tie_word_embeddings=False, num_experts=5),
}
LAYOUTS = [("moe", 2, "fsdp"), ("next", 3, "fsdp"), ("tied", 3, "second dims"), ("moe", 4, "two axes")]
"""Neither widths nor experts divide by 3."""


@dataclass
class Ranks:
    """What several processes made of a folder that transformers wrote."""

    layout: str
    root: Path
    weights: dict[str, Tensor]
    reports: list[dict[str, Any]]


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    family, world_size, layout = request.param
    root = tmp_path_factory.mktemp("ranks")
    weights = saved(CONFIGS[family], root / "theirs")
    return Ranks(layout, root, weights, run_ranks(world_size, layout, root))


def saved(config: PretrainedConfig, folder: Path) -> dict[str, Tensor]:
    """In memory transformers stacks experts under the names that we have; a tied head counts once."""
    logging.disable_progress_bar()
    model = hf_model(config).bfloat16()
    model.save_pretrained(folder, max_shard_size="60KB")
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def run_ranks(world_size: int, layout: str, root: Path) -> list[dict[str, Any]]:
    spawn(run_rank, args=(world_size, layout, root), nprocs=world_size)
    return [json.loads((root / f"rank_{rank}.json").read_text()) for rank in range(world_size)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_parts_of_all_processes_are_the_model(ranks: Ranks) -> None:
    full = torch.load(ranks.root / FULL)
    assert full.keys() == ranks.weights.keys()
    assert [name for name in full if not torch.equal(full[name], ranks.weights[name])] == []


def test_each_process_reads_what_it_holds_and_no_more(ranks: Ranks) -> None:
    assert all(report["bytes_read"] == report["bytes_held"] for report in ranks.reports)
    total = sum(weight.nbytes for weight in ranks.weights.values())
    if ranks.layout != "two axes":  # which holds vectors twice
        assert sum(report["bytes_read"] for report in ranks.reports) == total
    # The first ranks hold what does not divide: of 5 experts over 3 ranks 2, which is 1.2 times a third.
    assert max(report["bytes_read"] for report in ranks.reports) <= 1.2 * total / len(ranks.reports)


def test_processes_write_the_folder_back_byte_for_byte(ranks: Ranks) -> None:
    assert files_of(ranks.root / "ours") == files_of(ranks.root / "theirs")


def test_an_export_that_fails_on_rank_0_fails_on_every_process(ranks: Ranks) -> None:
    """Nobody waits for a rank that has given up."""
    below_a_file = str(ranks.root / "theirs" / "config.json" / "below_a_file")
    assert [report["error"] for report in ranks.reports] == [below_a_file] * len(ranks.reports)


def test_processes_share_the_blocks_of_fp8_weights(tmp_path: Path) -> None:
    saved(CONFIGS["moe"], tmp_path / "theirs")
    config_path, block = tmp_path / "theirs" / "config.json", (16, 20)
    config = json.loads(config_path.read_text())
    quantization = {"quant_method": "fp8", "weight_block_size": list(block)}
    config_path.write_text(json.dumps(config | {"quantization_config": quantization}))
    tensors: dict[str, Tensor] = {}
    for path in (tmp_path / "theirs").glob("model*"):
        tensors |= load_file(path) if path.suffix == ".safetensors" else {}
        path.unlink()
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.rand(-(-rows // block[0]), -(-columns // block[1])) + 0.5
    save_file(tensors, str(tmp_path / "theirs" / "model.safetensors"))
    alone = load_hf_model(tmp_path / "theirs", dtype=torch.bfloat16, device=torch.device("cpu"))

    run_ranks(3, "second dims", tmp_path)
    full = torch.load(tmp_path / FULL)
    assert all(torch.equal(full[name], parameter) for name, parameter in alone.named_parameters())


def test_random_weights_are_those_of_one_process_in_every_layout(ranks: Ranks) -> None:
    cpu = torch.device("cpu")
    alone = load_hf_model(ranks.root / "theirs", dtype=torch.bfloat16, device=cpu, fill=fill_with_dummies)
    drawn = torch.load(ranks.root / DRAWN)
    assert {name: weight.shape for name, weight in drawn.items()} == {n: p.shape for n, p in alone.named_parameters()}
    assert all(torch.equal(drawn[name], parameter) for name, parameter in alone.named_parameters())
