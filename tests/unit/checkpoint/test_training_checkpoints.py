from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lockstep.checkpoint.tensors import load_tensors, save_tensors
from lockstep.checkpoint.training import (
    delete_old_checkpoints,
    find_checkpoint,
    list_checkpoints,
    random_states,
    read_state,
    restore_random_states,
    save_checkpoint,
)
from lockstep.errors import CheckpointError


def save(root: Path, rollout_id: int, **state: Any) -> Path:
    return save_checkpoint(root, rollout_id, state=state, config_toml="x = 1", save_tensors=lambda folder: None)


def test_load_means_the_newest_whole_checkpoint_or_exactly_the_one_that_is_named(tmp_path: Path) -> None:
    for rollout_id in (2, 10, 9):
        save(tmp_path, rollout_id)
    (tmp_path / "rollout_0000011.incomplete").mkdir()
    newest = find_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "rollout_0000010"
    assert find_checkpoint(tmp_path / "rollout_0000002") == tmp_path / "rollout_0000002"


def test_an_empty_or_missing_folder_holds_no_checkpoint_and_a_foreign_one_is_refused(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) is None
    assert find_checkpoint(tmp_path / "missing") is None
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no training checkpoint"):
        find_checkpoint(tmp_path)


def test_what_earlier_runs_left_in_the_folder_does_not_keep_a_run_from_starting(tmp_path: Path) -> None:
    """A run that was killed before its first save starts again with the same `--save` and `--load`."""
    (tmp_path / "earlier-1" / "rollout_0000003").mkdir(parents=True)
    (tmp_path / "rollout_0000000.incomplete").mkdir()
    assert find_checkpoint(tmp_path) is None


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for rollout_id in (2, 10, 9):
        save(tmp_path, rollout_id)
    delete_old_checkpoints(tmp_path, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["rollout_0000009", "rollout_0000010"]
    assert len(list(tmp_path.iterdir())) == 2


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    state = read_state(save(tmp_path, 3, cursor=[1, 2], name="x"))
    assert (state["cursor"], state["name"]) == ([1, 2], "x")


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    (folder / "state.json").write_text('{"a": ')
    with pytest.raises(CheckpointError, match=r"state.json"):
        read_state(folder)


def test_a_missing_index_is_one_error_without_the_tracebacks_of_torch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tensors(tmp_path, {"w": torch.ones(2)})
    (tmp_path / ".metadata").unlink()
    caplog.clear()
    with pytest.raises(CheckpointError, match="a file is damaged"):
        load_tensors(tmp_path, {"w": torch.zeros(2)})
    assert caplog.records == []


def test_all_global_random_streams_go_on_where_they_were() -> None:
    def draws() -> list[float]:
        return [random.random(), random.gauss(0, 1), float(np.random.rand()), float(torch.rand(()))]

    draws()
    states = json.loads(json.dumps(random_states()))
    wanted = draws()
    draws()
    restore_random_states(states)
    assert draws() == wanted


def test_tensors_come_back_bit_for_bit_and_in_place(tmp_path: Path) -> None:
    saved = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "step": torch.tensor(7.0)}
    save_tensors(tmp_path, saved)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    places = {name: tensor.data_ptr() for name, tensor in loaded.items()}
    load_tensors(tmp_path, loaded)
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert {name: tensor.data_ptr() for name, tensor in loaded.items()} == places


@pytest.mark.parametrize("wanted", [{"a": torch.zeros(2, 3)}, {"c": torch.zeros(3)}], ids=["shape", "name"])
def test_tensors_of_another_model_are_refused(tmp_path: Path, wanted: dict[str, torch.Tensor]) -> None:
    save_tensors(tmp_path, {"a": torch.ones(3)})
    with pytest.raises(CheckpointError, match="do not fit this model"):
        load_tensors(tmp_path, wanted)


def test_a_truncated_tensor_file_is_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path, {"a": torch.ones(1000)})
    (file,) = tmp_path.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(CheckpointError):
        load_tensors(tmp_path, {"a": torch.zeros(1000)})
