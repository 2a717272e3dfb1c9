"""FP8 weights in blocks are read as their definition says, and every other quantisation is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import hf_model, moe_config, next_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from lockstep.checkpoint.hf import load_hf_model, save_hf_model
from lockstep.errors import ModelError

CPU = torch.device("cpu")
BLOCK = (16, 20)
"""Divides few of the tiny widths, so most weights have blocks that are not full at their edges."""
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def without_progress_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def is_quantised(name: str) -> bool:
    return name.endswith("_proj.weight") or name == "mtp.fc.weight"


def e4m3(code: int) -> float:
    """The number that 8 bits mean: sign, 4 bits of exponent with bias 7, 3 of fraction; all ones are not a number."""
    sign, exponent, fraction = -1.0 if code >> 7 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and fraction == 7:
        return float("nan")
    return sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


MEANING = np.array([e4m3(code) for code in range(256)], dtype=np.float32)


def quantise(folder: Path, scales: torch.dtype = torch.float32, max_rows: int = 10**9) -> dict[str, Tensor]:
    """Make the folder's projections FP8 with random codes and scales; returns what all its tensors mean, in fp32."""
    path = folder / "model.safetensors"
    draw, stored, meant = np.random.default_rng(0), {}, {}
    for name, tensor in load_file(path).items():
        if not is_quantised(name) or tensor.shape[0] > max_rows:
            stored[name], meant[name] = tensor, tensor.float()
            continue
        rows, columns = tensor.shape
        codes = draw.integers(0, 256, (rows, columns), dtype=np.uint8)
        codes[codes & 127 == 127] = 0
        grid = torch.from_numpy(
            draw.uniform(0.5, 2, (-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))).astype(np.float32)
        ).to(scales)
        stored[name] = torch.from_numpy(codes).view(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = grid
        meant[name] = torch.empty(rows, columns)
        for row in range(rows):
            for column in range(columns):
                scale = np.float32(grid[row // BLOCK[0], column // BLOCK[1]].float())
                meant[name][row, column] = float(MEANING[codes[row, column]] * scale)
    save_file(stored, str(path), metadata={"format": "pt"})
    configure(folder, {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"})
    return meant


def configure(folder: Path, quantization: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def quantised_folder(folder: Path, **options: Any) -> dict[str, Tensor]:
    hf_model(moe_config(1)).bfloat16().save_pretrained(folder)
    return quantise(folder, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16])
def test_fp8_weights_are_their_codes_times_the_scales_of_their_blocks(
    tmp_path: Path, scales: torch.dtype, dtype: torch.dtype
) -> None:
    """Exact: code times scale is rounded to fp32 once, then to the run's type."""
    meant = quantised_folder(tmp_path / "fp8", scales=scales)
    model = load_hf_model(tmp_path / "fp8", dtype=dtype, device=CPU)
    save_hf_model(model, tmp_path / "ours", source=tmp_path / "fp8")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert written.keys() == meant.keys()
    assert {tensor.dtype for tensor in written.values()} == {dtype}
    assert [name for name in meant if not torch.equal(written[name], meant[name].to(dtype))] == []


def test_an_export_of_fp8_weights_loads_in_transformers_as_unquantised_ones(tmp_path: Path) -> None:
    meant = quantised_folder(tmp_path / "fp8")
    model = load_hf_model(tmp_path / "fp8", dtype=torch.bfloat16, device=CPU)
    save_hf_model(model, tmp_path / "ours", source=tmp_path / "fp8")
    assert "quantization_config" not in json.loads((tmp_path / "ours" / "config.json").read_text())
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert back.dtype == torch.bfloat16
    weight = back.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(weight, meant[Q_PROJ].bfloat16())


def test_carried_weights_leave_fp8_too(tmp_path: Path) -> None:
    """Nobody could read them without the quantization_config."""
    hf_model(next_config(1)).bfloat16().save_pretrained(tmp_path / "fp8")
    path = tmp_path / "fp8" / "model.safetensors"
    save_file(load_file(path) | {"mtp.fc.weight": torch.randn(33, 21).bfloat16()}, str(path))
    meant = quantise(tmp_path / "fp8")
    model = load_hf_model(tmp_path / "fp8", dtype=torch.bfloat16, device=CPU)
    save_hf_model(model, tmp_path / "ours", source=tmp_path / "fp8")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert written.keys() == meant.keys()
    assert torch.equal(written["mtp.fc.weight"], meant["mtp.fc.weight"].bfloat16())


def test_a_scale_in_another_file_than_its_weight_is_found(tmp_path: Path) -> None:
    meant = quantised_folder(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    names = {name: f"{name.endswith('_scale_inv'):d}.safetensors" for name in tensors}
    for file in set(names.values()):
        save_file({name: tensor for name, tensor in tensors.items() if names[name] == file}, str(tmp_path / file))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    model = load_hf_model(tmp_path, dtype=torch.float32, device=CPU)
    assert torch.equal(model.get_parameter(Q_PROJ), meant[Q_PROJ])
    save_hf_model(model, tmp_path / "ours", source=tmp_path)
    assert [path.name for path in (tmp_path / "ours").glob("*.safetensors")] == ["0.safetensors"]


def change(name: str, edit: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        edited = edit(tensors.pop(name))
        save_file(tensors if edited is None else tensors | {name: edited.contiguous()}, str(path))

    return damage


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (change(Q_PROJ, lambda _: None), f"{Q_PROJ} is missing"),
        (change(f"{Q_PROJ}_scale_inv", lambda _: None), f"{Q_PROJ}_scale_inv is missing"),
        (change(f"{Q_PROJ}_scale_inv", lambda scale: scale[:-1]), f"{Q_PROJ}_scale_inv is F32"),
        (change(f"{Q_PROJ}_scale_inv", lambda scale: scale.T), f"{Q_PROJ}_scale_inv is F32"),
        (change(f"{Q_PROJ}_scale_inv", lambda scale: scale.to(torch.float8_e8m0fnu)), "F8_E8M0"),
        (change(Q_PROJ, lambda weight: weight.bfloat16()), "not quantised"),
        (change(Q_PROJ, lambda weight: weight.to(torch.float8_e5m2)), "F8_E5M2"),
        (change(Q_PROJ, lambda weight: weight[:-1]), "config.json asks for"),
    ],
)
def test_a_weight_without_its_scales_and_scales_without_their_weight_are_refused(
    tmp_path: Path, damage: Callable[[Path], None], named: str
) -> None:
    quantised_folder(tmp_path)
    damage(tmp_path)
    with pytest.raises(ModelError) as raised:
        load_hf_model(tmp_path, dtype=torch.float32, device=CPU)
    assert named in str(raised.value)
    assert Q_PROJ in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"quant_method": None}, "quant_method"),
        ({"weight_block_size": None}, "weight_block_size"),
        ({"weight_block_size": [128]}, r"weight_block_size is [128]"),
        ({"weight_block_size": [128, 0]}, r"weight_block_size is [128, 0]"),
        ({"activation_scheme": "static"}, "activation_scheme is 'static'"),
        ({"fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({"scale_fmt": "ue8m0"}, "scale_fmt is 'ue8m0'"),
        ({"zero_point": True}, "zero_point is True"),
        ("fp8", "quantization_config is 'fp8'"),
    ],
)
def test_another_quantisation_is_refused_by_name_and_value(tmp_path: Path, changes: Any, named: str) -> None:
    quantised_folder(tmp_path)
    fp8 = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
    configure(tmp_path, fp8 | changes if isinstance(changes, dict) else changes)
    with pytest.raises(ModelError) as raised:
        load_hf_model(tmp_path, dtype=torch.float32, device=CPU)
    assert named in str(raised.value)


def test_weights_that_are_not_quantised_under_a_config_that_says_so_are_refused(tmp_path: Path) -> None:
    hf_model(moe_config(1)).save_pretrained(tmp_path)
    configure(tmp_path, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(ModelError, match=r"no weight in .* is quantised"):
        load_hf_model(tmp_path, dtype=torch.float32, device=CPU)


def test_what_published_configs_say_besides_is_accepted(tmp_path: Path) -> None:
    """The stored types say again which weights are quantised."""
    meant = quantised_folder(tmp_path, max_rows=24)
    published = {"fmt": "e4m3", "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]}
    configure(tmp_path, {"quant_method": "fp8", "weight_block_size": list(BLOCK)} | published)
    model = load_hf_model(tmp_path, dtype=torch.float32, device=CPU)
    assert torch.equal(model.get_parameter(Q_PROJ), meant[Q_PROJ])
