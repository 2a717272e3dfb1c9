"""Megatron-Core's own GPTModel loads what we write, and we read what it saved; mbridge says what is right."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import CONFIGS, add_mtp, files_of, tensors_of, write_folder
from tiny_models import relative_error
from torch import Tensor
from transformers import AutoModelForCausalLM

from lockstep.checkpoint.megatron import hf_to_torch_dist, torch_dist_to_hf

ROOT = Path(__file__).parents[2]
PROCESSES = 2
TIMEOUT_S = 600

LOADED: dict[str, dict[str, Any]] = {
    "dense": {"tp": 2, "metadata": {"non_homogeneous_layers": True}},
    "tied": {},
    "moe": {"tp": 2, "ep": 2, "te_names": True, "moe_layer_freq": [1, 1, 1, 1]},
    "next": {"tp": 2, "ep": 2, "has_mtp": True},
}
"""Family -> the layout in which Megatron loads our checkpoint; slime's scripts give moe_layer_freq as a list."""
SAVED: dict[str, dict[str, Any]] = {
    "layers and experts stacked": {"ep": 2},
    "each expert and each half of linear_fc1 apart": {
        "tp": 2,
        "etp": 2,
        "metadata": {"singleton_local_shards": True},
    },
}
"""How Megatron saves a mixture of experts with random weights -> the layout."""


@dataclass(frozen=True)
class Found:
    """What Megatron made of a case."""

    folder: Path
    logits: Tensor
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """All cases, in two processes of the environment that has Megatron-Core."""
    subprocess.run([ROOT / "scripts/setup_megatron"], check=True, timeout=TIMEOUT_S)
    root = tmp_path_factory.mktemp("megatron")
    cases = []
    for name, layout in (LOADED | SAVED).items():
        folder = root / name
        case = {"hf": folder / "hf", "save": folder / "saved", "out": folder / "out.pt"} | layout
        if name in LOADED:
            write_folder(folder / "hf", name)
            if layout.get("has_mtp"):
                add_mtp(folder / "hf")
            hf_to_torch_dist(folder / "hf", folder / "ours")
            case["load"] = folder / "ours/release"
        else:
            CONFIGS["moe"]().save_pretrained(folder / "hf")
        cases.append(case)
    (root / "cases.json").write_text(json.dumps(cases, default=str))
    command = [ROOT / ".venv-megatron/bin/python", Path(__file__).with_name("oracle.py"), root / "cases.json"]
    running = [
        subprocess.Popen(
            [*command, root / "meeting", str(rank), str(PROCESSES)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(PROCESSES)
    ]
    said = [process.communicate(timeout=TIMEOUT_S)[0] for process in running]
    assert [process.returncode for process in running] == [0] * PROCESSES, "\n".join(said)
    return {name: Found(root / name, **torch.load(root / name / "out.pt")) for name in LOADED | SAVED}


@pytest.mark.parametrize("family", LOADED)
def test_megatron_computes_transformers_logits_from_our_checkpoint(megatron: dict[str, Found], family: str) -> None:
    """Both in fp32, each summing in its own order: 1e-5 of the largest logit, 1e-4 with the delta rule."""
    found = megatron[family]
    model = AutoModelForCausalLM.from_pretrained(found.folder / "hf", attn_implementation="eager")
    with torch.no_grad():
        logits = model(torch.arange(16)[None]).logits[0]
    error = relative_error(found.logits[:, : logits.shape[1]], logits)
    assert error <= (1e-4 if family == "next" else 1e-5)


@pytest.mark.parametrize("family", [family for family in LOADED if family != "next"])
def test_mbridge_finds_the_hf_tensors_in_what_megatron_loaded(megatron: dict[str, Found], family: str) -> None:
    """mbridge does not know Qwen3-Next."""
    require_equal(megatron[family].weights, tensors_of(megatron[family].folder / "hf"))


@pytest.mark.parametrize("family", LOADED)
def test_what_megatron_saves_again_is_the_same_hf_folder(
    megatron: dict[str, Found], family: str, tmp_path: Path
) -> None:
    folder = megatron[family].folder
    torch_dist_to_hf(folder / "saved", folder / "hf", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(folder / "hf")


@pytest.mark.parametrize("layout", SAVED)
def test_random_weights_that_megatron_saved_become_the_hf_tensors_that_mbridge_exports(
    megatron: dict[str, Found], layout: str, tmp_path: Path
) -> None:
    found = megatron[layout]
    torch_dist_to_hf(found.folder / "saved", found.folder / "hf", tmp_path / "ours")
    require_equal(tensors_of(tmp_path / "ours"), found.weights)


def require_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
