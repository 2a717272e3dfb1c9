"""Between HF folders and Megatron checkpoints: the same bytes come back, and damaged ones are refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import INDEX, add_mtp, edited, files_of, tensors_of, write_folder
from torch import Tensor

from lockstep import cli
from lockstep.checkpoint.megatron import hf_to_torch_dist, torch_dist_to_hf
from lockstep.checkpoint.megatron.torch_dist import TorchDistReader
from lockstep.errors import CheckpointError, LockstepError, ModelError, OptionError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_shard_size", ["1GB", "40KB"])
@pytest.mark.parametrize("family", ["dense", "tied", "bias", "moe", "mixed", "next"])
def test_an_hf_folder_comes_back_byte_for_byte(
    tmp_path: Path, family: str, max_shard_size: str, dtype: torch.dtype
) -> None:
    write_folder(tmp_path / "theirs", family, max_shard_size=max_shard_size, dtype=dtype)
    assert (max_shard_size == "40KB") == (tmp_path / "theirs" / INDEX).is_file()
    hf_to_torch_dist(tmp_path / "theirs", tmp_path / "megatron")
    assert torch_dist_to_hf(tmp_path / "megatron", tmp_path / "theirs", tmp_path / "back") == []
    assert files_of(tmp_path / "back") == files_of(tmp_path / "theirs")


def test_the_mtp_layer_comes_back_and_its_absence_is_said(tmp_path: Path) -> None:
    write_folder(tmp_path / "plain", "next")
    write_folder(tmp_path / "mtp", "next")
    add_mtp(tmp_path / "mtp")
    hf_to_torch_dist(tmp_path / "mtp", tmp_path / "megatron")
    assert torch_dist_to_hf(tmp_path / "megatron", tmp_path / "mtp", tmp_path / "back") == []
    assert files_of(tmp_path / "back") == files_of(tmp_path / "mtp")

    hf_to_torch_dist(tmp_path / "plain", tmp_path / "without")
    (note,) = torch_dist_to_hf(tmp_path / "without", tmp_path / "mtp", tmp_path / "left out")
    assert "no MTP layer" in note
    assert files_of(tmp_path / "left out") == files_of(tmp_path / "plain")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_that_megatron_stores_less_one_loses_no_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    """Weights below 1/2 have bits that the difference has no room for in their own type."""
    write_folder(tmp_path / "theirs", "next", dtype=dtype)
    weights = torch.tensor([0.3, -0.7, 1e-3, -1e-4, 0.0, 0.499, 1.01, 5.3]).to(dtype)

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.linear_attn.norm.weight"][: len(weights)] = weights

    edited(tmp_path / "theirs", edit)
    hf_to_torch_dist(tmp_path / "theirs", tmp_path / "megatron")
    torch_dist_to_hf(tmp_path / "megatron", tmp_path / "theirs", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(tmp_path / "theirs")


def test_the_vocabulary_is_padded_with_zeros_to_a_multiple_of_128_rows(tmp_path: Path) -> None:
    write_folder(tmp_path / "theirs", "dense", vocab_size=130)
    hf_to_torch_dist(tmp_path / "theirs", tmp_path / "megatron")
    reader = TorchDistReader(tmp_path / "megatron/release")
    for name, hf_name in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        stored, rows = reader.read(name), tensors_of(tmp_path / "theirs")[hf_name]
        assert stored.shape == (256, rows.shape[1])
        assert torch.equal(stored[:130], rows)
        assert stored[130:].count_nonzero() == 0


def test_a_tied_head_that_is_stored_comes_back_and_is_stored_once_by_megatron(tmp_path: Path) -> None:
    write_folder(tmp_path / "theirs", "tied")
    edited(tmp_path / "theirs", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    hf_to_torch_dist(tmp_path / "theirs", tmp_path / "megatron")
    assert "output_layer.weight" not in TorchDistReader(tmp_path / "megatron/release").tensors
    torch_dist_to_hf(tmp_path / "megatron", tmp_path / "theirs", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(tmp_path / "theirs")


def test_an_export_needs_no_weights_beside_config_and_index(tmp_path: Path) -> None:
    write_folder(tmp_path / "theirs", "moe", max_shard_size="40KB")
    hf_to_torch_dist(tmp_path / "theirs", tmp_path / "megatron")
    before = files_of(tmp_path / "theirs")
    for path in (tmp_path / "theirs").glob("*.safetensors"):
        path.unlink()
    torch_dist_to_hf(tmp_path / "megatron/release", tmp_path / "theirs", tmp_path / "back")
    assert files_of(tmp_path / "back") == before


def test_without_an_index_tensors_are_spread_over_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "theirs", "dense")
    hf_to_torch_dist(tmp_path / "theirs", tmp_path / "megatron")
    expected = tensors_of(tmp_path / "theirs")
    (tmp_path / "theirs/model.safetensors").unlink()
    monkeypatch.setattr("lockstep.checkpoint.megatron.to_hf.FILE_BYTES", 40_000)
    torch_dist_to_hf(tmp_path / "megatron", tmp_path / "theirs", tmp_path / "back")
    weight_map = json.loads((tmp_path / "back" / INDEX).read_text())["weight_map"]
    assert weight_map.keys() == expected.keys()
    assert len(set(weight_map.values())) > 1
    ours = tensors_of(tmp_path / "back")
    assert [name for name in expected if not torch.equal(ours[name], expected[name])] == []


def test_two_processes_write_what_one_does(tmp_path: Path) -> None:
    write_folder(tmp_path / "theirs", "moe", max_shard_size="20KB")

    def torchrun(*words: str | Path) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        subprocess.run(
            [*command, "-m", "lockstep", "convert", *words],
            check=True,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    torchrun("hf-to-torch-dist", "--hf-checkpoint", tmp_path / "theirs", "--save", tmp_path / "megatron")
    assert sorted(path.name for path in (tmp_path / "megatron/release").glob("*.distcp")) == [
        "__0_0.distcp",
        "__1_0.distcp",
    ]
    torchrun(
        "torch-dist-to-hf", "--load", tmp_path / "megatron", "--hf-checkpoint", tmp_path / "theirs",
        "--save-hf", tmp_path / "back",
    )  # fmt: skip
    assert files_of(tmp_path / "back") == files_of(tmp_path / "theirs")


def test_the_command_says_where_the_result_is_and_checks_megatrons_shape_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "theirs", "dense")
    there = ["convert", "hf-to-torch-dist", "--hf-checkpoint", str(tmp_path / "theirs")]
    assert cli.main([*there, "--save", str(tmp_path / "a"), "--num-layers", "40"]) == 1
    assert "--num-layers is 40" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    assert cli.main([*there, "--save", str(tmp_path / "a"), "--swiglu", "--qk-layernorm"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a'}\n"
    assert (tmp_path / "a/latest_checkpointed_iteration.txt").read_text() == "release"
    back = ["convert", "torch-dist-to-hf", "--input-dir", str(tmp_path / "a")]
    assert cli.main([*back, "--origin-hf-dir", str(tmp_path / "theirs"), "--output-dir", str(tmp_path / "b")]) == 0
    assert files_of(tmp_path / "b") == files_of(tmp_path / "theirs")


def lose(name: str) -> Callable[[Path], None]:
    return lambda folder: edited(folder, lambda tensors: tensors.pop(name))


def put(name: str, tensor: Tensor) -> Callable[[Path], None]:
    return lambda folder: edited(folder, lambda tensors: tensors.update({name: tensor}))


def set_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def cut(file: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (path,) = folder.rglob(file)
        path.write_bytes(path.read_bytes()[:-200])

    return change


def remove(file: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (path,) = folder.rglob(file)
        path.unlink()

    return change


def overwrite(file: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (path,) = folder.rglob(file)
        path.write_bytes(content + path.read_bytes()[len(content) :])

    return change


@pytest.mark.parametrize(
    ("damage", "error", "named"),
    [
        (set_config(model_type="llama"), ModelError, "llama"),
        (lose("model.layers.1.mlp.experts.2.up_proj.weight"), ModelError, "experts.2.up_proj.weight is 'missing'"),
        (put("model.layers.9.input_layernorm.weight", torch.ones(3)), ModelError, "model.layers.9.input_layernorm"),
        (put("model.norm.weight", torch.ones(3)), ModelError, "model.norm.weight is [3]"),
        (put("model.norm.weight", torch.ones(32, dtype=torch.int64)), ModelError, "model.norm.weight"),
        (cut("model.safetensors"), CheckpointError, "model.safetensors is 'damaged'"),
        (remove("model.safetensors"), CheckpointError, "model.safetensors is 'missing'"),
        (remove("config.json"), ModelError, "config.json"),
    ],
)
def test_a_damaged_hf_folder_is_refused_and_nothing_is_written(
    tmp_path: Path, damage: Callable[[Path], None], error: type[LockstepError], named: str
) -> None:
    write_folder(tmp_path / "theirs", "moe")
    damage(tmp_path / "theirs")
    with pytest.raises(error) as raised:
        hf_to_torch_dist(tmp_path / "theirs", tmp_path / "megatron")
    assert named in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize(
    ("damage", "error", "named"),
    [
        (set_config(num_hidden_layers=9), ModelError, "decoder.layers.4.self_attention"),
        (set_config(num_hidden_layers=1), ModelError, "decoder.layers.1."),
        (set_config(moe_intermediate_size=8), ModelError, "experts.linear_fc1.weight is [4, 32, 32]"),
        (set_config(vocab_size=300), ModelError, "embedding.word_embeddings.weight is [128, 32]"),
        (set_config(tie_word_embeddings=True), ModelError, "output_layer.weight"),
        (cut("__0_0.distcp"), CheckpointError, "__0_0.distcp is 'truncated'"),
        (remove("__0_0.distcp"), CheckpointError, "__0_0.distcp is 'missing'"),
        (remove("metadata.json"), CheckpointError, "metadata.json"),
        (remove(".metadata"), CheckpointError, ".metadata is 'missing'"),
        (overwrite(".metadata", b"nonsense"), CheckpointError, ".metadata is 'damaged'"),
        (overwrite("metadata.json", b'{"sharded_backend": "zarr"}' + b" " * 200), CheckpointError, "'zarr'"),
        (overwrite("latest_checkpointed_iteration.txt", b"never  "), CheckpointError, "'never'"),
    ],
)
def test_a_damaged_megatron_checkpoint_is_refused_and_nothing_is_written(
    tmp_path: Path, damage: Callable[[Path], None], error: type[LockstepError], named: str
) -> None:
    write_folder(tmp_path / "theirs", "moe")
    hf_to_torch_dist(tmp_path / "theirs", tmp_path / "megatron")
    (tmp_path / "theirs/model.safetensors").unlink()
    damage(tmp_path / "theirs" if error is ModelError else tmp_path / "megatron")
    with pytest.raises(error) as raised:
        torch_dist_to_hf(tmp_path / "megatron", tmp_path / "theirs", tmp_path / "back")
    assert named in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron", "theirs"]


def test_a_chunk_that_is_no_tensor_stops_the_export_halfway_and_leaves_nothing(tmp_path: Path) -> None:
    write_folder(tmp_path / "theirs", "moe")
    hf_to_torch_dist(tmp_path / "theirs", tmp_path / "megatron")
    path = tmp_path / "megatron/release/__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-3000] + b"x" * 3000)
    with pytest.raises(CheckpointError, match=r"__0_0.distcp is 'damaged'"):
        torch_dist_to_hf(tmp_path / "megatron", tmp_path / "theirs", tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron", "theirs"]


def test_an_index_that_names_other_code_does_not_run_it(tmp_path: Path) -> None:
    write_folder(tmp_path / "theirs", "dense")
    hf_to_torch_dist(tmp_path / "theirs", tmp_path / "megatron")
    (tmp_path / "megatron/release/.metadata").write_bytes(b"cos\nsystem\n(S'touch " + bytes(tmp_path) + b"/ran'\ntR.")
    with pytest.raises(CheckpointError, match=r"no index"):
        torch_dist_to_hf(tmp_path / "megatron", tmp_path / "theirs", tmp_path / "back")
    assert not (tmp_path / "ran").exists()


def test_an_existing_target_is_never_overwritten(tmp_path: Path) -> None:
    write_folder(tmp_path / "theirs", "dense")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(OptionError, match=r"--save is .* it exists"):
        hf_to_torch_dist(tmp_path / "theirs", tmp_path / "mine")
    hf_to_torch_dist(tmp_path / "theirs", tmp_path / "megatron")
    with pytest.raises(OptionError, match=r"--save-hf is .* it exists"):
        torch_dist_to_hf(tmp_path / "megatron", tmp_path / "theirs", tmp_path / "mine")
    assert files_of(tmp_path / "mine") == {"notes.txt": b"keep"}
