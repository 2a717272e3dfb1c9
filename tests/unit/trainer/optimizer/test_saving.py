from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from lockstep.checkpoint.tensors import load_tensors, save_tensors
from lockstep.config import OptimizerOptions
from lockstep.errors import CheckpointError
from lockstep.trainer.optimizer import Optimizer


class Peak:
    """How far the process's memory rose above where it began."""

    bytes = 0


@contextmanager
def peak_of_this_process() -> Iterator[Peak]:
    """Looks every millisecond; writing 160 MB takes a hundred times as long."""
    process, peak, done = psutil.Process(), Peak(), threading.Event()
    start = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.001):
            peak.bytes = max(peak.bytes, process.memory_info().rss - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def optimizer_of(moments: str, layers: int = 1, width: int = 64) -> Optimizer:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).bfloat16()
    small = {"use_precision_aware_optimizer": True, "exp_avg_dtype": moments, "exp_avg_sq_dtype": moments}
    optimizer = Optimizer(model, OptimizerOptions(**small))
    for parameter in model.parameters():
        parameter.backward(torch.randn_like(parameter))
    optimizer.step(1e-3)
    return optimizer


def test_a_save_streams_and_makes_no_second_copy(tmp_path: Path) -> None:
    optimizer = optimizer_of("fp32", layers=4, width=2048)
    state = dict(optimizer.named_state())
    whole = sum(tensor.nbytes for tensor in state.values())
    with peak_of_this_process() as peak:
        save_tensors(tmp_path, state)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) > whole
    assert peak.bytes < whole / 4


@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit"])
def test_saved_state_comes_back_bit_for_bit(tmp_path: Path, moments: str) -> None:
    one, other = optimizer_of(moments), optimizer_of(moments)
    other.restart()
    save_tensors(tmp_path, dict(one.named_state()))
    load_tensors(tmp_path, dict(other.named_state()))
    for (name, saved), (_, loaded) in zip(one.named_state(), other.named_state(), strict=True):
        assert torch.equal(saved, loaded), name


def test_state_of_another_format_is_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path, dict(optimizer_of("bf16").named_state()))
    with pytest.raises(CheckpointError, match="exp_avg_8bit"):
        load_tensors(tmp_path, dict(optimizer_of("8bit").named_state()))
