from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lockstep.config import OptimizerOptions
from lockstep.trainer.optimizer import Optimizer
from lockstep.trainer.optimizer.placement import SMALLEST_OFFLOADED, place_state

EIGHT_BIT = {"use_precision_aware_optimizer": True, "exp_avg_dtype": "8bit", "exp_avg_sq_dtype": "8bit"}


def model(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Four matrices of 512 x 512 with biases, without memory."""
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(512, 512) for _ in range(4))).to(dtype)


def place(dtype: torch.dtype = torch.bfloat16, **options: Any):  # type: ignore[no-untyped-def]
    return place_state(dict(model(dtype).named_parameters()), OptimizerOptions(**options))


@pytest.mark.parametrize(
    ("dtype", "moments", "wanted"),
    [
        (torch.float32, "fp32", 8),
        (torch.bfloat16, "fp32", 10),
        (torch.bfloat16, "bf16", 6),
        (torch.bfloat16, "8bit", 2 + 2 * (1 + 4 / 128)),
    ],
)
def test_bytes_per_number_are_those_of_the_table(dtype: torch.dtype, moments: str, wanted: float) -> None:
    small = {"use_precision_aware_optimizer": True, "exp_avg_dtype": moments, "exp_avg_sq_dtype": moments}
    of_vectors = 10 if moments == "8bit" else wanted  # which keep fp32 moments
    assert place(dtype, **small).device_bytes == 4 * (wanted * 512 * 512 + of_vectors * 512)


def test_what_is_counted_is_what_is_allocated() -> None:
    torch.manual_seed(0)
    small = nn.Sequential(nn.Linear(5, 300), nn.Linear(300, 7)).bfloat16()
    options = OptimizerOptions(**EIGHT_BIT)
    allocated = sum(t.nbytes for name, t in Optimizer(small, options).named_state() if name != "step")
    assert place_state(dict(small.named_parameters()), options).device_bytes == allocated


def test_without_the_option_nothing_leaves_the_device() -> None:
    assert place().host_bytes == 0


@pytest.mark.parametrize(("fraction", "moved"), [(0.0, []), (0.3, [3]), (0.55, [2, 3]), (1.0, [0, 1, 2, 3])])
def test_the_last_matrices_are_offloaded_up_to_the_fraction_and_vectors_stay(fraction: float, moved: list[int]) -> None:
    placement = place(optimizer_cpu_offload=True, optimizer_offload_fraction=fraction, **EIGHT_BIT)
    assert placement.on_host == {f"{i}.weight" for i in moved}
    per_matrix = (4 + 2 * 4 / 128) * 512 * 512
    assert placement.host_bytes == len(moved) * per_matrix
    assert placement.device_bytes == place(**EIGHT_BIT).device_bytes - placement.host_bytes


def test_a_matrix_too_small_to_be_worth_a_copy_stays() -> None:
    sides = {"below": 511, "at": 512}
    parameters = {name: torch.empty(512, side, device="meta") for name, side in sides.items()}
    assert parameters["at"].numel() == SMALLEST_OFFLOADED
    assert place_state(parameters, OptimizerOptions(optimizer_cpu_offload=True)).on_host == {"at"}
