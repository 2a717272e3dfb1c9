"""The sinks that the options ask for get every step; what they write is read back with their own readers."""

from __future__ import annotations

import json
import struct
import sys

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from lockstep.config import LoggingOptions
from lockstep.errors import OptionError
from lockstep.tracking import make_trackers


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch):
    for name in ("TENSORBOARD_DIR", "WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def scalars(log_dir):
    events = EventAccumulator(str(log_dir))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def wandb_records(path):
    """The records of wandb's own file: a 7-byte header, then (checksum, length, kind, content), as in LevelDB's log."""
    content, place = path.read_bytes(), 7
    assert len(content) < 32 * 1024, "a record may be split from the second block on"
    while place < len(content):
        _, length, kind = struct.unpack_from("<IHB", content, place)
        assert kind == 1, "a whole record"
        yield wandb_internal_pb2.Record.FromString(content[place + 7 : place + 7 + length])
        place += 7 + length


def wandb_history(run_dir):
    """What wandb stored offline: the rows, and the run's description."""
    (path,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    wandb.teardown()  # its writer is another process, which may still write after the run has finished
    records = list(wandb_records(path))
    rows = [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    shown = [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]
    return shown, next(record.run for record in records if record.HasField("run"))


def test_without_options_only_metrics_jsonl_is_written(tmp_path):
    trackers = make_trackers(LoggingOptions(), tmp_path, {})
    trackers.log(0, {"train/loss": 0.5})
    trackers.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_holds_every_scalar_at_its_step(tmp_path):
    options = LoggingOptions(use_tensorboard=True, tb_project_name="sums", tb_experiment_name="first")
    trackers = make_trackers(options, tmp_path, {})
    trackers.log(0, {"train/loss": 0.5, "rollout/raw_reward": 0.25})
    trackers.log(1, {"train/loss": 0.75})
    trackers.close()
    assert scalars(tmp_path / "tensorboard" / "sums" / "first") == {
        "train/loss": [(0, 0.5), (1, 0.75)],
        "rollout/raw_reward": [(0, 0.25)],
    }


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    options = LoggingOptions(use_tensorboard=True)
    first = make_trackers(options, tmp_path, {})
    for step in range(4):
        first.log(step, {"train/loss": float(step)})
    first.close()
    resumed = make_trackers(options, tmp_path, {})
    resumed.truncate_after(1)
    resumed.log(2, {"train/loss": 20.0})
    resumed.close()
    assert scalars(tmp_path / "tensorboard") == {"train/loss": [(0, 0.0), (1, 1.0), (2, 20.0)]}


def test_tensorboard_goes_where_its_variable_says(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path / "elsewhere"))
    trackers = make_trackers(LoggingOptions(use_tensorboard=True), tmp_path, {})
    trackers.log(0, {"train/loss": 0.5})
    trackers.close()
    assert scalars(tmp_path / "elsewhere") == {"train/loss": [(0, 0.5)]}


def test_wandb_offline_stores_every_step_with_its_axis(tmp_path):
    options = LoggingOptions(
        use_wandb=True,
        wandb_mode="offline",
        wandb_project="sums",
        wandb_group="night",
        disable_wandb_random_suffix=True,
    )
    trackers = make_trackers(options, tmp_path, {"lr": 0.5})
    trackers.log(0, {"train/loss": 0.5, "train/step": 3, "perf/step_time": 2.0})
    trackers.log(1, {"eval/sums": 0.75})
    trackers.close()
    rows, run = wandb_history(tmp_path)
    assert rows == [
        {"train/loss": 0.5, "train/step": 3, "perf/step_time": 2.0, "rollout/step": 0},
        {"eval/sums": 0.75, "eval/step": 1},
    ]
    assert (run.project, run.run_group, run.display_name) == ("sums", "night", "night")
    assert {item.key: item.value_json for item in run.config.update}["lr"] == "0.5"


def test_wandb_can_put_rollouts_on_the_axis_of_optimizer_steps(tmp_path):
    options = LoggingOptions(
        use_wandb=True, wandb_mode="offline", wandb_group="night", wandb_always_use_train_step=True
    )
    trackers = make_trackers(options, tmp_path, {})
    trackers.log(1, {"train/step": 8, "rollout/step": 1, "rollout/raw_reward": 0.5})
    trackers.close()
    rows, run = wandb_history(tmp_path)
    assert rows == [{"train/step": 8, "rollout/step": 8, "rollout/raw_reward": 0.5}]
    assert run.run_group.startswith("night_")
    assert len(run.run_group) > len("night_")


def test_wandb_online_without_a_key_says_how_to_give_one(tmp_path, monkeypatch):
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    with pytest.raises(OptionError, match=r"--use-wandb is True: .*No API key.* --wandb-mode offline needs neither"):
        make_trackers(LoggingOptions(use_wandb=True, wandb_mode="online"), tmp_path, {})


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_missing_package_is_named_with_the_command_that_brings_it(tmp_path, monkeypatch, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(OptionError, match=rf"--use-{package} is True: .*pip install {package}`"):
        make_trackers(LoggingOptions(**{f"use_{package}": True}), tmp_path, {})
