"""`--load-format dummy`: a model of random weights from config.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import moe_config, next_config
from transformers import PretrainedConfig

from lockstep.checkpoint.hf import fill_with_dummies, load_hf_model
from lockstep.config import Config
from lockstep.config.checks import check_training
from lockstep.errors import OptionError
from lockstep.models import LanguageModel

CPU = torch.device("cpu")


def drawn(config: PretrainedConfig, folder: Path) -> LanguageModel:
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return load_hf_model(folder, dtype=torch.float32, device=CPU, fill=fill_with_dummies)


@pytest.mark.parametrize("config", [moe_config(0), next_config(0)], ids=["moe", "next"])
def test_matrices_are_normal_and_vectors_leave_scales_alone(config: PretrainedConfig, tmp_path: Path) -> None:
    """Every number of a matrix is drawn anew: with thousands of them the deviation is 0.02 to a few per cent."""
    model = drawn(config, tmp_path)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            centred = "norm" in name and config.model_type == "qwen3_next" and "linear_attn" not in name
            assert parameter.eq(0.0 if centred or "A_log" in name else 1.0).all(), name
    matrices = torch.cat([p.detach().flatten() for p in model.parameters() if p.dim() > 1])
    assert matrices.std() == pytest.approx(0.02, rel=0.02)
    assert abs(matrices.mean()) < 2e-4
    assert len(matrices.unique()) > 0.9 * len(matrices), "fp32 has that many"


def test_experts_differ_and_a_second_time_nothing_does(tmp_path: Path) -> None:
    model, again = drawn(moe_config(0), tmp_path), drawn(moe_config(0), tmp_path)
    experts = next(p for name, p in model.named_parameters() if "experts.down" in name)
    assert not torch.equal(experts[0], experts[1])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_progress_ends_with_all_bytes_of_the_matrices(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    model = drawn(moe_config(0), tmp_path)
    fill_with_dummies(model, tmp_path, on_bytes=lambda done, total: seen.append((done, total)))
    matrices = sum(p.nbytes for p in model.parameters() if p.dim() > 1)
    assert seen[-1] == (matrices, matrices)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"rollout_engine": "sglang", "sglang_python": "python"}, "--load-format"),
        ({"save": "there", "save_hf": "hf"}, "--save-hf"),
    ],
)
def test_they_stay_in_our_own_processes(options: dict[str, Any], field: str) -> None:
    run = {"hf_checkpoint": "model", "prompt_data": "prompts.jsonl", "rm_type": "random", "num_rollout": 1}
    config = Config.from_dict(run | {"n_samples_per_prompt": 2, "load_format": "dummy"} | options)
    with pytest.raises(OptionError) as caught:
        check_training(config)
    assert caught.value.field == field
