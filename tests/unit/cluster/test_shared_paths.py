from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lockstep.cluster import shared_paths
from lockstep.cluster.shared_paths import Expected, expected_paths
from lockstep.config import Config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for name in ("model", "reference"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    checkpoint = tmp_path / "save" / "rollout_0000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    return Config.from_dict(
        {
            "hf_checkpoint": str(tmp_path / "model"),
            "ref_load": str(tmp_path / "reference"),
            "use_kl_loss": True,
            "save": str(tmp_path / "save"),
            "load": str(tmp_path / "save"),
            "save_hf": str(tmp_path / "hf" / "{rollout_id}"),
        }
    )


def complaints(paths: list[Expected]) -> dict[str, str | None]:
    return {path.option: path.complaint() for path in paths}


def test_where_everything_is_shared_nobody_complains_and_nothing_is_left(config: Config, tmp_path: Path) -> None:
    with expected_paths(config) as paths:
        assert complaints(paths) == dict.fromkeys(
            ("--hf-checkpoint", "--ref-load", "--load", "--save", "--save-hf"), None
        )
        assert {path.option: path.path for path in paths}["--load"] == str(tmp_path / "save" / "rollout_0000003")
    assert [path.name for path in (tmp_path / "save").iterdir()] == ["rollout_0000003"]
    assert list((tmp_path / "hf").iterdir()) == []


def test_a_node_that_sees_other_files_or_folders_says_which(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine where these paths are local: the controller's own view is changed after it was taken."""
    monkeypatch.setattr(shared_paths, "_SEEN_WITHIN_S", 0.2)
    with expected_paths(config) as paths:
        markers = {path.option: path.marker for path in paths}
        (tmp_path / "model" / "config.json").write_text("{ }")
        (tmp_path / "reference" / "config.json").unlink()
        shutil.rmtree(tmp_path / "save" / "rollout_0000003")
        (tmp_path / "save" / str(markers["--save"])).rename(tmp_path / "elsewhere")
        assert complaints(paths) == {
            "--hf-checkpoint": "config.json has 3 bytes, not 2",
            "--ref-load": "config.json is missing",
            "--load": "there is no such folder",
            "--save": "it is another folder than the controller's",
            "--save-hf": None,
        }
        error = paths[0].error("10.0.0.3", "config.json is missing")
        (tmp_path / "elsewhere").rename(tmp_path / "save" / str(markers["--save"]))
    assert str(error) == (
        f"--hf-checkpoint is '{tmp_path}/model': on node 10.0.0.3 config.json is missing. Put it on a file system that "
        "all nodes mount at the same place, or copy the folder to the same place on each."
    )
