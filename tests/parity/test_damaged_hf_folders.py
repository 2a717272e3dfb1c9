"""Whatever happens to an HF folder, loading says so in our words, or gives the same weights."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, hf_model
from torch import Tensor
from transformers.utils import logging

from lockstep.checkpoint.hf import load_hf_model
from lockstep.errors import LockstepError

INDEX = "model.safetensors.index.json"
DAMAGES_OF_EACH_KIND = 25
Damage = Callable[[Path, random.Random], None]


def load(folder: Path) -> dict[str, Tensor]:
    return load_hf_model(folder, dtype=torch.float32, device=torch.device("cpu")).state_dict()


@pytest.fixture(scope="module", params=CONFIGS)
def good(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / request.param
    logging.disable_progress_bar()
    hf_model(CONFIGS[request.param](1)).save_pretrained(folder, max_shard_size="100KB")
    return folder


def a_file(folder: Path, draw: random.Random, pattern: str = "*.safetensors") -> Path:
    return draw.choice(sorted(folder.glob(pattern)))


def cut(folder: Path, draw: random.Random) -> None:
    path = a_file(folder, draw, "model*")
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def flip_bits_of_a_header(folder: Path, draw: random.Random) -> None:
    path = a_file(folder, draw)
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(draw.choice([1, 1, 3])):
        content[draw.randrange(header)] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def flip_bits_of_the_index(folder: Path, draw: random.Random) -> None:
    path = folder / INDEX
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def rewrite_a_header(folder: Path, draw: random.Random) -> None:
    """Valid JSON with another shape, type or place for a tensor, or with an entry more or less."""
    path = a_file(folder, draw)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = draw.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    edits: list[Callable[[], Any]] = [
        lambda: entry["shape"].append(1),
        lambda: entry["shape"].clear(),
        lambda: entry["shape"].reverse(),
        lambda: entry.update(shape=[-1, 3]),
        lambda: entry.update(shape=[2**62, 2**62]),
        lambda: entry.update(dtype=draw.choice(["I8", "F4", "BF16", "C64", "BOOL", "", "F32 "])),
        lambda: entry.update(data_offsets=[0, 8]),
        lambda: entry.update(data_offsets=entry["data_offsets"][::-1]),
        lambda: header.pop(name),
        lambda: header.update({f"{name}.more": entry}),
        lambda: header.update({name: None}),
    ]
    before = json.dumps(header)
    while json.dumps(header) == before:  # a vector's shape reads the same backwards
        draw.choice(edits)()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def edit_tensors(folder: Path, draw: random.Random) -> None:
    """Files as safetensors writes them, with a tensor too many, too few, or other than it was."""
    path = a_file(folder, draw)
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    edits: list[Callable[[], Any]] = [
        lambda: tensors.pop(name),
        lambda: tensors.update({name.replace("model", "modle") + "x": tensors.pop(name)}),
        lambda: tensors.update({name: torch.zeros(tensors[name].numel() + 1)}),
        lambda: tensors.update({name: tensors[name].to(torch.int8)}),
        lambda: tensors.update({name: tensors[name].to(torch.complex64)}),
        lambda: tensors.update({name: tensors[name].unsqueeze(0)}),
        lambda: tensors.update({name: torch.tensor(1.0)}),
        lambda: tensors.update({name: torch.zeros(0)}),
        lambda: tensors.update({f"{name}_scale_inv": torch.ones(1, 1)}),
        lambda: tensors.update({"": torch.ones(1)}),
    ]
    draw.choice(edits)()
    save_file(tensors, str(path), metadata=draw.choice([None, {"format": "pt"}]))
    if draw.random() < 0.5:
        name_in_index(folder, dict.fromkeys(tensors, path.name))


def name_in_index(folder: Path, more: dict[str, str]) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= more
    (folder / INDEX).write_text(json.dumps(index))


def store_twice(folder: Path, draw: random.Random) -> None:
    path = a_file(folder, draw)
    target = draw.choice([*sorted(folder.glob("*.safetensors")), folder / "more.safetensors"])
    if target == path:
        return
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    held = load_file(target) if target.is_file() else {}
    save_file(held | {name: tensors[name]}, str(target))
    if draw.random() < 0.5:
        name_in_index(folder, {name: target.name})


def change_files(folder: Path, draw: random.Random) -> None:
    first, second = a_file(folder, draw), a_file(folder, draw)
    edits: list[Callable[[], Any]] = [
        lambda: first.unlink(),
        lambda: first.rename(folder / "other.safetensors"),
        lambda: shutil.copyfile(first, folder / "other.safetensors"),
        lambda: (first.unlink(), first.mkdir()),
        lambda: first.write_bytes(second.read_bytes() if first != second else b""),
        lambda: (folder / INDEX).unlink(),
        lambda: (folder / INDEX).write_bytes(b"\xff\xfe"),
        lambda: (folder / "config.json").write_bytes(draw.randbytes(30)),
        lambda: (folder / "config.json").write_text("[" * 100_000),
        lambda: (folder / INDEX).write_text("[" * 100_000),
    ]
    draw.choice(edits)()


def change_the_config(folder: Path, draw: random.Random) -> None:
    """Numbers that shapes depend on."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    sized = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    field = draw.choice([*sized, "num_experts", "num_local_experts", "moe_intermediate_size", "intermediate_size"])
    if field in config:
        config[field] += draw.choice([1, 2, -1])
    config["attention_bias"] ^= draw.random() < 0.3
    path.write_text(json.dumps(config))


DAMAGES: list[Damage] = [
    cut,
    flip_bits_of_a_header,
    flip_bits_of_the_index,
    rewrite_a_header,
    edit_tensors,
    store_twice,
    change_files,
    change_the_config,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_folder_is_refused_in_our_words_or_loads_as_before(
    tmp_path: Path, good: Path, damage: Damage
) -> None:
    weights, refused = load(good), 0
    for seed in range(DAMAGES_OF_EACH_KIND):
        folder = tmp_path / str(seed)
        shutil.copytree(good, folder)
        damage(folder, random.Random(seed))
        try:
            loaded = load(folder)
        except LockstepError:
            refused += 1
        else:
            assert loaded.keys() == weights.keys(), seed
            assert [name for name in weights if not torch.equal(loaded[name], weights[name])] == [], seed
        shutil.rmtree(folder)
    assert refused > DAMAGES_OF_EACH_KIND / 2  # what does no harm is rare
