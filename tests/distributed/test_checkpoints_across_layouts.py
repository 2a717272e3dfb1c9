"""Whatever layout writes a checkpoint, any other reads the same state from it, number by number."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_ranks import COUNTS, Case, run_rank
from e2e_runs import checkpoint_tensors
from tiny_models import dense_config, next_config
from torch import Tensor
from torch.multiprocessing import start_processes

from lockstep.errors import CheckpointError

COMMON = {"vocab_size": 64, "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
CONFIGS = {
    # Divided by 2 and by 4, every width is a multiple of a block's 128; head-dim vectors are not.
    "dense": dense_config(
        0, **COMMON, num_hidden_layers=2, intermediate_size=512, attention_bias=True, tie_word_embeddings=True
    ),
    "next": next_config(
        0,
        **COMMON,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        linear_conv_kernel_dim=4,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=16,
        linear_value_head_dim=64,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        shared_expert_intermediate_size=512,
        attention_bias=False,
        tie_word_embeddings=False,
    ),
}
ODD = dense_config(
    0, **COMMON, num_hidden_layers=1, intermediate_size=320, attention_bias=False, tie_word_embeddings=False
)
"""Halves and quarters of 320 end inside a block."""

FORMATS = [
    ("dense", torch.float32, ("fp32", "fp32")),
    ("dense", torch.bfloat16, ("8bit", "bf16")),
    ("next", torch.bfloat16, ("bf16", "8bit")),
]
"""Family, type of weights, types of both moments."""

LAYOUTS: dict[int, list[dict[str, int]]] = {
    2: [{"ep_size": 2}, {"tp_size": 2, "ep_size": 2}, {"cp_size": 2, "etp_size": 2}, {"pp_size": 2}],
    4: [
        {"ep_size": 4},
        {"tp_size": 2, "ep_size": 2, "etp_size": 2},
        {"tp_size": 4},
        {"pp_size": 2, "tp_size": 2, "ep_size": 2},
        {"cp_size": 2, "tp_size": 2},
    ],
}


def random_bits(tensor: Tensor, draw: torch.Generator) -> None:
    """Any bits that are no NaN: unlike numbers, they tell every place from every other."""
    if tensor.dtype == torch.int64:
        tensor.fill_(12)
    elif tensor.is_floating_point():
        tensor.copy_(torch.randn(tensor.shape, generator=draw))
    else:
        info = torch.iinfo(tensor.dtype)
        tensor.copy_(torch.randint(info.min, info.max + 1, tensor.shape, generator=draw))


def make_case(config: Any, dtype: torch.dtype, moments: tuple[str, str], folder: Path) -> Case:
    """One process's checkpoint in `folder`, and what is in it."""
    case = Case(config.to_dict(), dtype, moments, {})
    trainer, draw = case.local_trainer(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in trainer._state(True):
            random_bits(tensor, draw)
            case.tensors[name] = tensor.clone()
    folder.mkdir()
    trainer.save(folder)
    return case


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_a_checkpoint_of_any_layout_is_equal_state_in_any_other(tmp_path: Path, world_size: int) -> None:
    """One process writes; layouts read and write in turn; one process reads. Weights, the moved reference, remainders
    of masters, moments in every format and the step counter are equal bit for bit, on every rank and at the end."""
    cases = {}
    for family, dtype, moments in FORMATS:
        name = f"{family} {str(dtype).removeprefix('torch.')} {' '.join(moments)}"
        cases[name] = make_case(CONFIGS[family], dtype, moments, tmp_path / name)
        torch.save(cases[name], tmp_path / f"{name}.case")
    (tmp_path / "8bit").mkdir()
    odd = make_case(ODD, torch.bfloat16, ("8bit", "8bit"), tmp_path / "8bit" / "odd")
    torch.save(odd, tmp_path / "8bit" / "odd.case")
    multiprocessing.set_forkserver_preload(["lockstep.trainer.parallel"])
    start_processes(
        run_rank, args=(world_size, LAYOUTS[world_size], tmp_path), nprocs=world_size, start_method="forkserver"
    )

    reports = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(world_size)]
    problems = [f"rank {rank}: {problem}" for rank, report in enumerate(reports) for problem in report["problems"]]
    assert not problems, "\n".join(problems)
    for name, case in cases.items():
        last = tmp_path / reports[0]["last"][name]
        stored = checkpoint_tensors(last)
        assert stored.keys() == case.tensors.keys(), "neither names nor formats depend on the layout"
        trainer = case.local_trainer()
        with torch.no_grad():
            for _, tensor in trainer._state(True):
                tensor.zero_()
        trainer.load(last)
        wrong = [name for name, tensor in trainer._state(True) if not torch.equal(tensor, case.tensors[name])]
        assert not wrong, name
        assert trainer.state_dict() == COUNTS
    for report in reports:
        (refusal,) = report["refusals"]
        assert "mlp.down_proj.weight" in refusal
        assert f"cut over {world_size} ranks" in refusal
        assert "--tensor-model-parallel-size" in refusal
    with pytest.raises(CheckpointError, match=r"mlp\.down_proj\.weight is 'cut over"):
        odd.local_trainer().load(tmp_path / "8bit" / "cut")
