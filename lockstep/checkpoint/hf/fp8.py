"""Weights stored in 8 bits with one scale for each block of a matrix, as DeepSeek and Qwen publish them.

N and K are the rows and columns of a weight; a block is `weight_block_size` of them, less at the lower and right edge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lockstep.checkpoint.hf.files import FLOATS, FP8, TensorInfo, WeightFiles
from lockstep.checkpoint.hf.shards import Region
from lockstep.errors import ModelError

SCALE_SUFFIX = "_scale_inv"
_NOTES = {"modules_to_not_convert", "ignored_layers", "dequantize"}
"""Fields that the stored types say again, or that tell a server what to do."""
_ONLY = {"activation_scheme": "dynamic", "fmt": "e4m3", "scale_fmt": "float"}
"""Fields of which one value is read, which is also what their absence means."""
_UNQUANTISED = "Use the checkpoint in bfloat16, or in FP8 with a scale for each block of the weights."


@dataclass(frozen=True)
class Blocks:
    """Rows and columns of a weight that share one scale."""

    rows: int
    columns: int

    def scale_shape(self, weight_shape: tuple[int, ...]) -> tuple[int, ...]:
        return -(-weight_shape[0] // self.rows), -(-weight_shape[1] // self.columns)


def read_quantization(hf_config: Mapping[str, Any]) -> Blocks | None:
    """What config.json's `quantization_config` says; None when the weights are not quantised.

    Raises:
        ModelError: any quantisation but FP8 in blocks, by name and value.
    """
    quantization = hf_config.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        raise ModelError("config.json quantization_config", quantization, "it is no JSON object.", _UNQUANTISED)
    fields = dict(quantization)
    method = fields.pop("quant_method", None)
    if method != "fp8":
        _refuse("quant_method", method, "weights quantised like this are not read.")
    size = fields.pop("weight_block_size", None)
    if not isinstance(size, list) or len(size) != 2 or any(type(n) is not int or n < 1 for n in size):
        _refuse("weight_block_size", size, "a scale for each block of so many rows and columns is what is read.")
    for name, value in fields.items():
        if name in _ONLY and value != _ONLY[name]:
            _refuse(name, value, f"only {_ONLY[name]!r} is read.")
        if name not in _ONLY and name not in _NOTES:
            _refuse(name, value, "the field is not known here, so the weights might mean something else.")
    return Blocks(*size)


def _refuse(field: str, value: Any, reason: str) -> None:
    raise ModelError(f"config.json quantization_config {field}", value, reason, _UNQUANTISED)


def require_weight(files: WeightFiles, scale: str) -> None:
    """Check that the weight is there which stored scales belong to; `require_readable` checks the pair.

    Raises:
        ModelError: it is not.
    """
    weight = scale.removesuffix(SCALE_SUFFIX)
    if weight not in files.tensors:
        raise ModelError(
            f"{files.folder} tensor {scale}", files.tensors[scale].dtype, f"{weight} is missing.", _UNQUANTISED
        )


def require_readable(files: WeightFiles, name: str, blocks: Blocks | None) -> None:
    """Check a stored weight's type, and that it has scales where it needs them and only there.

    Raises:
        ModelError: it has not.
    """
    info, scale = files.tensors[name], files.tensors.get(name + SCALE_SUFFIX)
    if info.dtype in FLOATS and scale is None:
        return
    reason = None
    if info.dtype not in (*FLOATS, FP8):
        reason = "weights of this type are not read."
    elif info.dtype in FLOATS:
        reason = f"it is not quantised, but {name}{SCALE_SUFFIX} is there to scale it."
    elif blocks is None:
        reason = "it is quantised, but config.json has no quantization_config that says how."
    elif scale is None:
        reason = f"it is quantised, but {name}{SCALE_SUFFIX} is missing."
    elif len(info.shape) != 2:
        reason = f"its shape is {list(info.shape)}, and only matrices have blocks."
    elif scale != TensorInfo(blocks.scale_shape(info.shape), scale.dtype) or scale.dtype not in FLOATS:
        reason = (
            f"{name}{SCALE_SUFFIX} is {scale.dtype} {list(scale.shape)}, not {list(blocks.scale_shape(info.shape))}."
        )
    if reason is not None:
        raise ModelError(f"{files.folder} tensor {name}", info.dtype, reason, _UNQUANTISED)


def read_into(target: Tensor, files: WeightFiles, name: str, region: Region, blocks: Blocks | None) -> None:
    """Fill `target` with a region of a stored weight, in the target's own type; FP8 is scaled in fp32."""
    stored = files.read(name, region)
    if files.tensors[name].dtype != FP8:
        target.copy_(stored)
        return
    assert blocks is not None, "require_readable came first"
    rows, columns = region
    first = slice(rows.start // blocks.rows, -(-rows.stop // blocks.rows))
    second = slice(columns.start // blocks.columns, -(-columns.stop // blocks.columns))
    scales = files.read(name + SCALE_SUFFIX, (first, second)).to(target.device, torch.float32)
    left = columns.start - second.start * blocks.columns
    per_column = scales.repeat_interleave(blocks.columns, dim=1)[:, left : left + columns.stop - columns.start]
    stored = stored.to(target.device)
    for block, scale_K in zip(range(first.start, first.stop), per_column, strict=True):
        start = max(block * blocks.rows, rows.start) - rows.start
        stop = min((block + 1) * blocks.rows, rows.stop) - rows.start
        target[start:stop] = stored[start:stop].float() * scale_K
