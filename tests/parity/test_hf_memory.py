"""Loading needs the model and one file of weights at most, exporting the model and one tensor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import moe_config
from transformers import AutoModelForCausalLM
from transformers.utils import logging

SLACK = 12 * 2**20
"""For what Python and the allocator take meanwhile, of which 2 MiB were seen; a file has 32 MiB."""

MEASURE = """
import json, re, sys
from pathlib import Path
import psutil, torch
from lockstep.checkpoint.hf import load_hf_model, read_hf_config, save_hf_model
from lockstep.models import build_model, read_model_config

action, folder, device = sys.argv[1], Path(sys.argv[2]), torch.device("cpu")
with torch.device("meta"):
    model = build_model(read_model_config(read_hf_config(folder))).bfloat16()
model_bytes = sum(parameter.nbytes for parameter in model.parameters())
started = psutil.Process().memory_info().rss
if action == "load":
    model = load_hf_model(folder, dtype=torch.bfloat16, device=device)
else:
    model = model.to_empty(device=device)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    save_hf_model(model, folder.with_name("ours"), source=folder)
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(json.dumps({"model": model_bytes, "grown": peak - started}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """236 MB of random weights in seven files."""
    folder = tmp_path_factory.mktemp("big") / "theirs"
    config = moe_config(
        0,
        vocab_size=16384,
        hidden_size=1024,
        num_hidden_layers=2,
        num_experts=32,
        num_experts_per_tok=2,
        moe_intermediate_size=512,
        tie_word_embeddings=True,
        mlp_only_layers=[],
    )
    logging.disable_progress_bar()
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="64MB")
    assert len(list(folder.glob("*.safetensors"))) >= 4  # else the bound says little
    return folder


def grown(action: str, folder: Path) -> tuple[int, int]:
    """Bytes of the model, and by how much a process of its own grew at most."""
    command = [sys.executable, "-c", MEASURE, action, str(folder)]
    measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return measured["model"], measured["grown"]


def test_loading_holds_the_model_and_the_pages_of_one_file(folder: Path) -> None:
    largest_file = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    model_bytes, bytes_grown = grown("load", folder)
    assert model_bytes < bytes_grown < model_bytes + largest_file + SLACK


def test_exporting_holds_the_model_and_one_tensor(folder: Path) -> None:
    model_bytes, bytes_grown = grown("export", folder)
    assert model_bytes < bytes_grown < model_bytes + SLACK
