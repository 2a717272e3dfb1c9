"""Runs a recipe small: the same options, with a tiny model of the same family, on CPUs.

    python recipes/twin.py recipes/qwen3-30b-a3b-8gpu [--output DIR] [options of `lockstep train`]

It makes a random model of some hundred thousand numbers and addition problems, and runs `lockstep train` on the recipe.
Only sizes are other than the recipe's, and rewards, which are random because such a model gets no answer right. What is
other in every twin stands in `SIZES`, and what is other in the twin of one recipe in its `twin.toml`. Where that has a
table `sampling`, a first run with its options samples, and the second trains on what it has stored.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).parent
SIZES: dict[str, Any] = {
    "rm_type": "random",
    "num_rollout": 2,
    "rollout_batch_size": 2,
    "n_samples_per_prompt": 4,
    "rollout_max_prompt_len": 32,
    "rollout_max_response_len": 24,
    "rollout_max_tokens": 2048,
    "rollout_max_running_requests": 8,
    "eval_max_response_len": 24,
    "n_samples_per_eval_prompt": 1,
    "max_tokens_per_gpu": 128,
    "save_interval": 1,
    "num_threads": 1,
    "device": "cpu",
}
COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3-4b": {"model_type": "qwen3", **COMMON, "tie_word_embeddings": True},
    "qwen3-30b-a3b": {"model_type": "qwen3_moe", **COMMON, **EXPERTS, "norm_topk_prob": True},
    "qwen3-next-80b-a3b": {
        "model_type": "qwen3_next",
        **COMMON,
        **EXPERTS,
        "num_key_value_heads": 2,
        "num_hidden_layers": 8,
        "full_attention_interval": 4,
        "shared_expert_intermediate_size": 32,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "norm_topk_prob": True,
    },
}
"""Heads and experts that divide by what the recipes divide the real ones by."""


def family_of(recipe: Path) -> str:
    """A recipe's folder is named after its model and its machines."""
    return recipe.name.rsplit("-", 1)[0]


def make_model(family: str, folder: Path, quickstart: ModuleType) -> None:
    """A random model in HF format, with the quickstart's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    quickstart.make_checkpoint(folder, seed=0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**FAMILIES[family]), dtype=torch.bfloat16)
    model.save_pretrained(folder)


def make_data(folder: Path, quickstart: ModuleType) -> None:
    quickstart.write_rows(folder / "train.jsonl", quickstart.make_prompt_rows("train", 32, seed=0))
    rows = [{key: row[key] for key in ("prompt", "label")} for row in quickstart.make_prompt_rows("heldout", 2, seed=0)]
    quickstart.write_rows(folder / "heldout.jsonl", rows)


def twin_options(recipe: Path, output: Path) -> dict[str, Any]:
    """What differs from the recipe."""
    own = recipe / "twin.toml"
    data = output / "data"
    run = output / "run"
    return {
        **SIZES,
        "hf_checkpoint": data / "model",
        "prompt_data": data / "train.jsonl",
        "eval_prompt_data": ["sums", data / "heldout.jsonl"],
        "load": run / "checkpoints",
        "save": run / "checkpoints",
        "run_dir": run,
        **(tomllib.loads(own.read_text()) if own.exists() else {}),
    }


def runs(options: dict[str, Any], output: Path) -> Iterator[dict[str, Any]]:
    """The options of each run."""
    sampling = options.pop("sampling", None)
    if sampling is None:
        yield options
        return
    stored, apart = output / "rollouts" / "{rollout_id}.pt", output / "sampling"
    places = {"load": apart / "checkpoints", "save": apart / "checkpoints", "run_dir": apart}
    yield options | sampling | places | {"debug_rollout_only": True, "save_debug_rollout_data": stored}
    yield options | {"load_debug_rollout_data": stored}


def words(options: dict[str, Any]) -> list[str]:
    """Options as flags of the command line."""
    flags: list[str] = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        flags += ["--" + name.replace("_", "-"), *map(str, values)]
    return flags


def quickstart_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare", HERE / "quickstart" / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["prepare"] = module
    spec.loader.exec_module(module)
    return module


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="the recipe's folder")
    parser.add_argument("--output", type=Path, help="where to write (default: runs/twins and the recipe's name)")
    arguments, more = parser.parse_known_args()
    recipe: Path = arguments.recipe.resolve()
    output: Path = (arguments.output or Path("runs/twins") / recipe.name).resolve()
    quickstart = quickstart_module()
    make_model(family_of(recipe), output / "data" / "model", quickstart)
    make_data(output / "data", quickstart)
    command = [sys.executable, "-m", "lockstep", "train", str(recipe / "recipe.toml")]
    for options in runs(twin_options(recipe, output), output):
        code = subprocess.run([*command, *words(options), *more], check=False).returncode
        if code != 0:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
