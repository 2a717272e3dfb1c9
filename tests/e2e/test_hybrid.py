"""A Qwen3-Next model through the whole loop: trained, evaluated, resumed, exported with what is only carried."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_runs import Workshop, assert_same_checkpoint, read_metrics, run, write_model
from safetensors.torch import load_file, save_file
from tiny_models import hf_model, next_config
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def hybrid(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """The workshop with a hybrid in place of its model; MTP tensors lie in its folder as in published ones."""
    folder = write_model(tmp_path_factory.mktemp("hybrid") / "model")
    ours = json.loads((folder / "config.json").read_text())
    config = next_config(
        0,
        vocab_size=ours["vocab_size"],
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        max_position_embeddings=ours["max_position_embeddings"],
        tie_word_embeddings=False,
        eos_token_id=ours.get("eos_token_id"),
    )
    (folder / "model.safetensors").unlink()
    hf_model(config).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    carried = {"mtp.fc.weight": torch.randn(32, 64), "mtp.layers.0.mlp.experts.0.up_proj.weight": torch.randn(16, 32)}
    save_file(weights | carried, folder / "model.safetensors", metadata={"format": "pt"})
    return Workshop(root=workshop.root, model=folder, data=workshop.data, heldout=workshop.heldout)


def options(root: Path, **changes: Any) -> dict[str, Any]:
    return {"save": root / "checkpoints", "load": root / "checkpoints", "save_interval": 1, "num_rollout": 4} | changes


def test_a_hybrid_trains_in_step_with_its_sampler_and_resumes_bit_for_bit(hybrid: Workshop, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    heldout = {"eval_prompt_data": ["heldout", hybrid.heldout], "eval_interval": 2}
    run(*hybrid.train(whole, **options(whole, save_hf=whole / "hf", **heldout)))
    rows = read_metrics(whole)
    differences = [row["train/train_rollout_logprob_abs_diff"] for row in rows if "train/loss" in row]
    assert len(differences) == 4
    assert max(differences) < 1e-4
    assert any("eval/heldout" in row for row in rows)

    run(*hybrid.train(parts, **options(parts, num_rollout=2, lr_decay_iters=4, **heldout)))
    run(*hybrid.train(parts, **options(parts, lr_decay_iters=4, **heldout)))
    assert read_metrics(parts) == rows
    last = "rollout_0000003"
    assert_same_checkpoint(parts / "checkpoints" / last, whole / "checkpoints" / last)

    before, after = (load_file(folder / "model.safetensors") for folder in (hybrid.model, whole / "hf"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("mtp."))
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("linear_attn.A_log" in name for name in moved)
    assert any("shared_expert" in name for name in moved)
    AutoModelForCausalLM.from_pretrained(whole / "hf")
