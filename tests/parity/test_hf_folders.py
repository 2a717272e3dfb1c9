"""HF folders written by transformers load here; ours load there; damaged ones are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import dense_config, hf_logits, hf_model, moe_config, packed_logits, random_documents, relative_error
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lockstep.checkpoint.hf import load_hf_model, save_hf_model
from lockstep.errors import CheckpointError, LockstepError, ModelError
from lockstep.models import Qwen3

CPU = torch.device("cpu")
DOCUMENTS = random_documents([9, 14])
INDEX = "model.safetensors.index.json"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Qwen3:
    return load_hf_model(folder, dtype=dtype, device=CPU)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def saved_by_transformers(folder: Path, family: str, **options: Any) -> PreTrainedModel:
    changes = {"tie_word_embeddings": True} if family == "tied" else {"tie_word_embeddings": False}
    model = hf_model(moe_config(1, **changes) if family == "moe" else dense_config(1, **changes))
    model.save_pretrained(folder, **options)
    return model


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("family", ["dense", "tied", "moe"])
def test_a_folder_goes_through_us_and_back_unchanged(tmp_path: Path, family: str, max_shard_size: str) -> None:
    theirs = saved_by_transformers(tmp_path / "theirs", family, max_shard_size=max_shard_size)
    ours = load(tmp_path / "theirs")
    assert relative_error(packed_logits(ours, DOCUMENTS), hf_logits(theirs, DOCUMENTS)) <= 1e-5

    save_hf_model(ours, tmp_path / "ours", source=tmp_path / "theirs")
    before, after = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    files = {path.name for path in (tmp_path / "theirs").glob("*.safetensors")}
    assert {path.name for path in (tmp_path / "ours").glob("*.safetensors")} == files
    assert (len(files) > 1) == (max_shard_size == "20KB")
    if len(files) > 1:
        indices = [json.loads((tmp_path / side / INDEX).read_text()) for side in ("theirs", "ours")]
        assert indices[0]["weight_map"] == indices[1]["weight_map"]
        assert indices[0]["metadata"]["total_size"] == indices[1]["metadata"]["total_size"]

    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert relative_error(hf_logits(back, DOCUMENTS), hf_logits(theirs, DOCUMENTS)) <= 1e-6


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_weights_round_trip_bit_for_bit(tmp_path: Path, stored: torch.dtype) -> None:
    hf_model(moe_config(1)).to(stored).save_pretrained(tmp_path / "theirs")
    save_hf_model(load(tmp_path / "theirs", stored), tmp_path / "ours", source=tmp_path / "theirs")
    before, after = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours")
    assert {name: t.dtype for name, t in after.items()} == dict.fromkeys(before, stored)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_export_says_the_type_it_was_written_in(tmp_path: Path) -> None:
    hf_model(dense_config(1)).bfloat16().save_pretrained(tmp_path / "theirs")
    save_hf_model(load(tmp_path / "theirs", torch.float32), tmp_path / "ours", source=tmp_path / "theirs")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert back.dtype == torch.float32


def test_an_export_of_a_tied_model_whose_source_stored_the_head_twice_is_consistent(tmp_path: Path) -> None:
    theirs = saved_by_transformers(tmp_path / "theirs", "tied", max_shard_size="20KB")
    shard = tmp_path / "theirs" / "extra.safetensors"
    save_file({"lm_head.weight": theirs.lm_head.weight.detach().clone()}, str(shard), metadata={"format": "pt"})
    index = json.loads((tmp_path / "theirs" / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = shard.name
    (tmp_path / "theirs" / INDEX).write_text(json.dumps(index))

    save_hf_model(load(tmp_path / "theirs"), tmp_path / "ours", source=tmp_path / "theirs")

    weight_map = json.loads((tmp_path / "ours" / INDEX).read_text())["weight_map"]
    assert weight_map.keys() == tensors_of(tmp_path / "ours").keys()
    assert all((tmp_path / "ours" / file).is_file() for file in weight_map.values())
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert relative_error(hf_logits(back, DOCUMENTS), hf_logits(theirs, DOCUMENTS)) <= 1e-6


def edited(folder: Path, edit: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, str(path), metadata={"format": "pt"})


def lose_an_expert(folder: Path) -> None:
    edited(folder, lambda tensors: tensors.pop("model.layers.0.mlp.experts.2.up_proj.weight"))


def add_a_layer(folder: Path) -> None:
    edited(folder, lambda tensors: tensors.update({"model.layers.9.input_layernorm.weight": torch.ones(3)}))


def reshape_the_norm(folder: Path) -> None:
    edited(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))


def transpose_an_expert(folder: Path) -> None:
    name = "model.layers.0.mlp.experts.0.down_proj.weight"
    edited(folder, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))


def cut_the_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_the_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def empty_the_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def lose_the_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def store_a_tensor_twice(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, str(folder / "second.safetensors"))
    names = dict.fromkeys(tensors, "model.safetensors") | {"model.norm.weight": "second.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))


def break_the_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {')


def empty_the_index(folder: Path) -> None:
    (folder / INDEX).write_text("{}")


def point_the_index_nowhere(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "model-2.safetensors"}}))


def quantise_a_weight(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    edited(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))


def break_the_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def lose_the_config(folder: Path) -> None:
    (folder / "config.json").unlink()


DAMAGES = [
    (lose_an_expert, ModelError, "layers.0.mlp.experts.2.up_proj.weight"),
    (add_a_layer, ModelError, "layers.9.input_layernorm.weight"),
    (reshape_the_norm, ModelError, "model.norm.weight"),
    (transpose_an_expert, ModelError, "experts.0.down_proj.weight"),
    (cut_the_file, CheckpointError, "model.safetensors"),
    (cut_the_header, CheckpointError, "model.safetensors"),
    (empty_the_file, CheckpointError, "model.safetensors"),
    (lose_the_file, CheckpointError, "model.safetensors"),
    (store_a_tensor_twice, ModelError, "model.norm.weight"),
    (break_the_index, CheckpointError, INDEX),
    (empty_the_index, CheckpointError, INDEX),
    (point_the_index_nowhere, CheckpointError, "model-2.safetensors"),
    (quantise_a_weight, ModelError, "self_attn.q_proj.weight"),
    (break_the_config, ModelError, "config.json"),
    (lose_the_config, ModelError, "config.json"),
]


@pytest.mark.parametrize(("damage", "error", "named"), DAMAGES, ids=lambda value: getattr(value, "__name__", None))
def test_a_damaged_folder_is_refused_naming_what_is_wrong(
    tmp_path: Path, damage: Any, error: type[LockstepError], named: str
) -> None:
    saved_by_transformers(tmp_path, "moe")
    damage(tmp_path)
    with pytest.raises(error) as raised:
        load(tmp_path)
    assert named in str(raised.value)
    assert raised.value.reason
    assert raised.value.remedy


def test_a_failed_export_leaves_the_earlier_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_by_transformers(tmp_path / "theirs", "dense")
    model = load(tmp_path / "theirs")
    save_hf_model(model, tmp_path / "ours", source=tmp_path / "theirs")
    before = tensors_of(tmp_path / "ours")

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lockstep.checkpoint.hf.save_file", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        save_hf_model(model, tmp_path / "ours", source=tmp_path / "theirs")
    after = tensors_of(tmp_path / "ours")
    assert before.keys() == after.keys()
    assert [path.name for path in tmp_path.iterdir() if "incomplete" in path.name] == []
