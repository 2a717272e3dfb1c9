"""Small HF folders to convert, and what is in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import dense_config, hf_model, moe_config, next_config
from torch import Tensor
from transformers import PreTrainedModel

INDEX = "model.safetensors.index.json"
SPLIT = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": False, "tie_word_embeddings": False}
"""Shapes that two processes can share, and that Megatron's flags can say."""
DELTA = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
CONFIGS = {
    "dense": lambda **changes: dense_config(1, **SPLIT | changes),
    "tied": lambda **changes: dense_config(2, **SPLIT | {"tie_word_embeddings": True} | changes),
    "bias": lambda **changes: dense_config(4, **SPLIT | {"attention_bias": True} | changes),
    "moe": lambda **changes: moe_config(3, **SPLIT | {"num_experts": 4} | changes),
    "mixed": lambda **changes: moe_config(2, **SPLIT | {"num_hidden_layers": 3, "decoder_sparse_step": 2} | changes),
    "next": lambda **changes: next_config(3, **SPLIT | DELTA | changes),
}


def write_folder(
    folder: Path, family: str, *, max_shard_size: str = "1GB", dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """An HF folder as transformers saves it."""
    model = hf_model(CONFIGS[family](**changes)).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edited(folder: Path, edit: Any) -> None:
    """Change the tensors of a folder with one file."""
    tensors = tensors_of(folder)
    edit(tensors)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def add_mtp(folder: Path) -> None:
    """Give a Qwen3-Next folder the layer that predicts a second token, as Qwen's own checkpoints name it."""
    hidden = json.loads((folder / "config.json").read_text())["hidden_size"]
    draw = torch.Generator().manual_seed(7)

    def edit(tensors: dict[str, Tensor]) -> None:
        config = json.loads((folder / "config.json").read_text())
        last = config["layer_types"].index("full_attention")
        prefix = f"model.layers.{last}."
        like = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        shapes = {f"mtp.layers.0.{name}": tensor.shape for name, tensor in like.items()}
        shapes |= {"mtp.fc.weight": (hidden, 2 * hidden)}
        shapes |= {f"mtp.{name}.weight": (hidden,) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
        tensors |= {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}

    edited(folder, edit)
