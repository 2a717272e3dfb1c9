"""Buckets hold every HF tensor once, whole, where their lists say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import CONFIGS, hf_model, twin_of

from lockstep.weight_sync.source import BucketPlan


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("num_bytes", [1, 5000, 2**30])
def test_flat_buckets_are_cut_into_the_tensors_that_transformers_saves(
    family: str, num_bytes: int, tmp_path: Path
) -> None:
    """In bf16, after an update in place: the plan is made once, the numbers are those of now."""
    saved = hf_model(CONFIGS[family](1)).bfloat16()
    model = twin_of(saved)
    model.bfloat16()
    plan = BucketPlan(num_bytes)
    plan.of(model)
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), saved.parameters(), strict=True):
            ours += 1
            theirs += 1
    saved.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    for bucket in plan.of(model):
        flat, begin = bucket.flattened(), 0
        assert len(flat) == bucket.ends[-1]
        assert len(flat) <= num_bytes or len(bucket.names) == 1
        for name, dtype, shape, end in zip(bucket.names, bucket.dtypes, bucket.shapes, bucket.ends, strict=True):
            assert end - begin == math.prod(shape) * dtype.itemsize
            assert torch.equal(flat[begin:end].view(dtype).view(shape), expected.pop(name)), name
            begin = end
    assert not expected, "a tensor was not sent"
