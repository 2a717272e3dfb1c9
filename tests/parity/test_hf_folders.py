"""HF folders written by transformers load here; ours load there; damaged ones are refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    CONFIGS,
    hf_logits,
    hf_model,
    packed_logits,
    random_documents,
    relative_error,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lockstep.checkpoint.hf import load_hf_model, save_hf_model
from lockstep.errors import CheckpointError, LockstepError, ModelError
from lockstep.models import LanguageModel

CPU = torch.device("cpu")
DOCUMENTS = random_documents([9, 14])
INDEX = "model.safetensors.index.json"
PARITY = {"dense": 1e-5, "tied": 1e-5, "moe": 1e-5, "next": 1e-4}
"""As in the parity ladder."""


@pytest.fixture(autouse=True)
def without_progress_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def load(folder: Path, dtype: torch.dtype = torch.float32) -> LanguageModel:
    return load_hf_model(folder, dtype=dtype, device=CPU)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def saved_by_transformers(
    folder: Path, family: str, dtype: torch.dtype = torch.float32, **options: Any
) -> PreTrainedModel:
    is_tied = family == "tied"
    model = hf_model(CONFIGS["dense" if is_tied else family](1, tie_word_embeddings=is_tied)).to(dtype)
    model.save_pretrained(folder, **options)
    return model


def add_tensors(folder: Path, tensors: dict[str, Tensor], file: str = "model.safetensors") -> None:
    """Store more tensors in a file of a folder, and name them in its index."""
    path = folder / file
    held = load_file(path) if path.is_file() else {}
    save_file(held | tensors, str(path), metadata={"format": "pt"})
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] |= dict.fromkeys(tensors, file)
        index["metadata"]["total_size"] += sum(tensor.nbytes for tensor in tensors.values())
        index["metadata"]["total_parameters"] += sum(tensor.numel() for tensor in tensors.values())
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("family", PARITY)
def test_a_folder_goes_through_us_and_back_byte_for_byte(
    tmp_path: Path, family: str, max_shard_size: str, dtype: torch.dtype
) -> None:
    """Every file: header, order and bytes of the tensors, the sharding index, config.json and what lies beside."""
    theirs = saved_by_transformers(tmp_path / "theirs", family, dtype, max_shard_size=max_shard_size)
    (tmp_path / "theirs" / "chat_template.jinja").write_text("{{ messages }}")
    ours = load(tmp_path / "theirs", dtype)
    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
    save_hf_model(ours, tmp_path / "ours", source=tmp_path / "theirs")
    assert (len(list((tmp_path / "ours").glob("*.safetensors"))) > 1) == (max_shard_size == "20KB")
    assert files_of(tmp_path / "theirs") == files_of(tmp_path / "ours")
    if dtype == torch.float32:
        assert relative_error(packed_logits(ours, DOCUMENTS), hf_logits(theirs, DOCUMENTS)) <= PARITY[family]
        back = AutoModelForCausalLM.from_pretrained(
            tmp_path / "ours", attn_implementation="eager", experts_implementation="eager"
        )
        # The same weights elsewhere in memory: transformers rounds by alignment.
        assert relative_error(hf_logits(back, DOCUMENTS), hf_logits(theirs, DOCUMENTS)) <= 1e-6


@pytest.mark.parametrize("max_shard_size", ["1GB", "40KB"])
def test_weights_of_the_mtp_layer_are_carried_through(tmp_path: Path, max_shard_size: str) -> None:
    """They lie among the others, and one file holds nothing else."""
    folder = tmp_path / "theirs"
    saved_by_transformers(folder, "next", torch.bfloat16, max_shard_size=max_shard_size)
    first = min(folder.glob("*.safetensors")).name
    draw = torch.Generator().manual_seed(0)
    add_tensors(folder, {"mtp.fc.weight": torch.randn(32, 64, generator=draw).bfloat16()}, first)
    if max_shard_size != "1GB":
        mtp = {f"mtp.layers.0.mlp.experts.{i}.up_proj.weight": torch.randn(3, 5).bfloat16() for i in range(3)}
        add_tensors(folder, mtp | {"mtp.norm.weight": torch.randn(7, generator=draw)}, "mtp.safetensors")
    model = load(folder, torch.bfloat16)
    assert not any("mtp" in name for name, _ in model.named_parameters())
    save_hf_model(model, tmp_path / "ours", source=folder)
    assert files_of(folder) == files_of(tmp_path / "ours")


def test_an_export_says_the_type_it_was_written_in(tmp_path: Path) -> None:
    saved_by_transformers(tmp_path / "theirs", "dense", torch.bfloat16, max_shard_size="20KB")
    save_hf_model(load(tmp_path / "theirs", torch.float32), tmp_path / "ours", source=tmp_path / "theirs")
    before, after = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours")
    assert all(torch.equal(before[name].float(), after[name]) for name in before)
    sizes = [json.loads((tmp_path / side / INDEX).read_text())["metadata"] for side in ("theirs", "ours")]
    assert sizes[1] == {key: value * (2 if key == "total_size" else 1) for key, value in sizes[0].items()}
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert back.dtype == torch.float32


def test_loading_and_exporting_report_every_byte(tmp_path: Path) -> None:
    saved_by_transformers(tmp_path / "theirs", "moe", max_shard_size="20KB")
    sizes = [tensor.nbytes for tensor in tensors_of(tmp_path / "theirs").values()]
    reports: list[tuple[int, int]] = []

    def on_bytes(done: int, total: int) -> None:
        reports.append((done, total))

    model = load_hf_model(tmp_path / "theirs", dtype=torch.bfloat16, device=CPU, on_bytes=on_bytes)
    save_hf_model(model, tmp_path / "ours", source=tmp_path / "theirs", on_bytes=on_bytes)
    loaded, exported = reports[: len(sizes)], reports[len(sizes) :]
    for name, parts, total in (("read", loaded, sum(sizes)), ("written", exported, sum(sizes) // 2)):
        assert {known for _, known in parts} == {total}, name
        steps = [after - before for (before, _), (after, _) in pairwise([(0, total), *parts])]
        assert sorted(steps) == sorted(size * total // sum(sizes) for size in sizes), name


def test_an_index_without_totals_gets_none(tmp_path: Path) -> None:
    """And keeps its order of names: older tools wrote what we do not know."""
    saved_by_transformers(tmp_path / "theirs", "dense", max_shard_size="20KB")
    index = json.loads((tmp_path / "theirs" / INDEX).read_text())
    shuffled = dict(reversed(index["weight_map"].items()))
    (tmp_path / "theirs" / INDEX).write_text(json.dumps({"weight_map": shuffled, "metadata": {"note": 1}}, indent=4))
    save_hf_model(load(tmp_path / "theirs"), tmp_path / "ours", source=tmp_path / "theirs")
    assert (tmp_path / "theirs" / INDEX).read_bytes() == (tmp_path / "ours" / INDEX).read_bytes()


def test_a_head_stored_beside_tied_embeddings_is_read_and_written_as_it_was(tmp_path: Path) -> None:
    """Qwen3-0.6B is published like this."""
    theirs = saved_by_transformers(tmp_path / "theirs", "tied", max_shard_size="20KB")
    add_tensors(tmp_path / "theirs", {"lm_head.weight": theirs.lm_head.weight.detach().clone()}, "extra.safetensors")
    ours = load(tmp_path / "theirs")
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    save_hf_model(ours, tmp_path / "ours", source=tmp_path / "theirs")
    assert files_of(tmp_path / "theirs") == files_of(tmp_path / "ours")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert relative_error(hf_logits(back, DOCUMENTS), hf_logits(theirs, DOCUMENTS)) <= 1e-6


def test_a_trained_head_beside_tied_embeddings_is_refused(tmp_path: Path) -> None:
    """Config and weights mean two models, and transformers' versions do not agree which."""
    theirs = saved_by_transformers(tmp_path, "tied")
    head = theirs.lm_head.weight.detach().clone()
    head[-1, -1] += 1e-3
    add_tensors(tmp_path, {"lm_head.weight": head})
    with pytest.raises(ModelError, match=r"lm_head.weight.*tie_word_embeddings"):
        load(tmp_path)


def test_a_model_is_not_exported_into_the_names_of_another(tmp_path: Path) -> None:
    saved_by_transformers(tmp_path / "dense", "dense")
    saved_by_transformers(tmp_path / "moe", "moe")
    with pytest.raises(ModelError, match="no such tensor"):
        save_hf_model(load(tmp_path / "dense"), tmp_path / "ours", source=tmp_path / "moe")
    assert not (tmp_path / "ours").exists()


def edited(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, str(path), metadata={"format": "pt"})


def lose_an_expert(folder: Path) -> None:
    edited(folder, lambda tensors: tensors.pop("model.layers.0.mlp.experts.2.up_proj.weight"))


def add_a_layer(folder: Path) -> None:
    edited(folder, lambda tensors: tensors.update({"model.layers.9.input_layernorm.weight": torch.ones(3)}))


def fuse_the_experts(folder: Path) -> None:
    """As transformers holds them in memory; on disk it writes and reads one tensor per expert."""

    def fuse(tensors: dict[str, Tensor]) -> None:
        prefix = "model.layers.0.mlp.experts"
        experts = range(sum(name.startswith(prefix) for name in tensors) // 3)
        down = [tensors.pop(f"{prefix}.{expert}.down_proj.weight") for expert in experts]
        tensors[f"{prefix}.down_proj"] = torch.stack(down)

    edited(folder, fuse)


def carry_what_is_not_carried(folder: Path) -> None:
    edited(folder, lambda tensors: tensors.update({"mtp.fc.weight": torch.ones(3)}))


def reshape_the_norm(folder: Path) -> None:
    edited(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))


def transpose_an_expert(folder: Path) -> None:
    name = "model.layers.0.mlp.experts.0.down_proj.weight"
    edited(folder, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))


def store_integers(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    edited(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))


def store_doubles(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    edited(folder, lambda tensors: tensors.update({name: tensors[name].double()}))


def cut_the_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lengthen_the_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + bytes(100))


def cut_the_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def empty_the_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def lose_the_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def write_index(folder: Path, changes: dict[str, str]) -> None:
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": names | changes}))


def store_a_tensor_twice(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, str(folder / "second.safetensors"))
    write_index(folder, {"model.norm.weight": "second.safetensors"})


def store_a_tensor_twice_with_the_index_on_the_first(folder: Path) -> None:
    store_a_tensor_twice(folder)
    save_file({"mtp": torch.ones(1), "model.norm.weight": torch.ones(3)}, str(folder / "second.safetensors"))
    write_index(folder, {"mtp": "second.safetensors"})


def add_a_file_that_nobody_names(folder: Path) -> None:
    save_file({"model.norm.weight": torch.ones(3)}, str(folder / "second.safetensors"))


def break_the_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {')


def empty_the_index(folder: Path) -> None:
    (folder / INDEX).write_text("{}")


def list_the_index(folder: Path) -> None:
    (folder / INDEX).write_text("[1]")


def number_the_index(folder: Path) -> None:
    write_index(folder, {"model.norm.weight": 1})  # type: ignore[dict-item]


def leave_the_folder(folder: Path) -> None:
    write_index(folder, {"model.norm.weight": "../model.safetensors"})


def forget_a_tensor_in_the_index(folder: Path) -> None:
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    names.pop("model.norm.weight")
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))


def promise_a_tensor_in_the_index(folder: Path) -> None:
    write_index(folder, {"model.norm.bias": "model.safetensors"})


def point_the_index_nowhere(folder: Path) -> None:
    write_index(folder, {"model.norm.weight": "model-2.safetensors"})


def lose_the_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def quantise_a_weight(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    edited(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def claim_another_quantisation(folder: Path) -> None:
    configure(folder, quantization_config={"quant_method": "awq", "bits": 4})


def claim_a_quantisation(folder: Path) -> None:
    configure(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})


def claim_another_family(folder: Path) -> None:
    configure(folder, model_type="llama")


def claim_more_experts(folder: Path) -> None:
    configure(folder, num_local_experts=9)


def claim_more_layers(folder: Path) -> None:
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    configure(folder, num_hidden_layers=layers + 1)


def claim_a_smaller_vocabulary(folder: Path) -> None:
    configure(folder, vocab_size=96)


def break_the_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def lose_the_config(folder: Path) -> None:
    (folder / "config.json").unlink()


DAMAGES = [
    (lose_an_expert, ModelError, "layers.0.mlp.experts.2.up_proj.weight"),
    (add_a_layer, ModelError, "layers.9.input_layernorm.weight"),
    (fuse_the_experts, ModelError, "model.layers.0.mlp.experts.down_proj"),
    (carry_what_is_not_carried, ModelError, "mtp.fc.weight"),
    (reshape_the_norm, ModelError, "model.norm.weight"),
    (transpose_an_expert, ModelError, "experts.0.down_proj.weight"),
    (store_integers, ModelError, "q_proj.weight is 'I8'"),
    (store_doubles, ModelError, "q_proj.weight is 'F64'"),
    (cut_the_file, CheckpointError, "model.safetensors"),
    (lengthen_the_file, CheckpointError, "model.safetensors"),
    (cut_the_header, CheckpointError, "model.safetensors"),
    (empty_the_file, CheckpointError, "model.safetensors"),
    (lose_the_file, CheckpointError, "model.safetensors"),
    (store_a_tensor_twice, CheckpointError, "model.norm.weight"),
    (store_a_tensor_twice_with_the_index_on_the_first, CheckpointError, "model.norm.weight"),
    (add_a_file_that_nobody_names, CheckpointError, "second.safetensors"),
    (break_the_index, CheckpointError, INDEX),
    (empty_the_index, CheckpointError, INDEX),
    (list_the_index, CheckpointError, INDEX),
    (number_the_index, CheckpointError, "model.norm.weight"),
    (leave_the_folder, CheckpointError, "../model.safetensors"),
    (forget_a_tensor_in_the_index, CheckpointError, "model.norm.weight"),
    (promise_a_tensor_in_the_index, CheckpointError, "model.norm.bias"),
    (point_the_index_nowhere, CheckpointError, "model-2.safetensors"),
    (lose_the_index, CheckpointError, "model.safetensors"),
    (quantise_a_weight, ModelError, "self_attn.q_proj.weight"),
    (claim_another_quantisation, ModelError, "quantization_config quant_method is 'awq'"),
    (claim_a_quantisation, ModelError, "quantization_config"),
    (claim_another_family, ModelError, "llama"),
    (claim_more_experts, ModelError, "9"),
    (claim_more_layers, ModelError, "model.layers.2."),
    (claim_a_smaller_vocabulary, ModelError, "96"),
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


EXPORT_TO_A_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from lockstep.checkpoint.hf import load_hf_model, save_hf_model
from lockstep.errors import CheckpointError

folder = Path(sys.argv[1])
model = load_hf_model(folder / "theirs", dtype=torch.float32, device=torch.device("cpu"))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
try:
    save_hf_model(model, folder / "ours", source=folder / "theirs")
except CheckpointError as error:
    print("CheckpointError", error)
"""


def test_an_export_to_a_full_disk_leaves_the_earlier_one_whole(tmp_path: Path) -> None:
    """The disk is full for files of more than 40 KB, in a process of its own."""
    saved_by_transformers(tmp_path / "theirs", "dense")
    model = load(tmp_path / "theirs")
    save_hf_model(model, tmp_path / "ours", source=tmp_path / "theirs")
    before = files_of(tmp_path / "ours")
    result = subprocess.run(
        [sys.executable, "-c", EXPORT_TO_A_FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert "CheckpointError" in result.stdout, result.stderr
    assert files_of(tmp_path / "ours") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]
