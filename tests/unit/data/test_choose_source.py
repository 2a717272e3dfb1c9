"""Data sources of the user's own: built as in slime, numbered, saved and resumed."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from lockstep.config import Config
from lockstep.data import RolloutDataSourceWithBuffer
from lockstep.data.choose_source import NoPrompts, SlimeDataSource, make_data_source
from lockstep.errors import DataError, OptionError
from lockstep.types import Sample

SOURCES = '''
import json
from pathlib import Path

from lockstep.types import Sample


class Plain:
    """Counts; two samples a prompt, no ids."""

    def __init__(self, args):
        self.args, self.position, self.buffer = args, 0, []

    def __len__(self):
        return 10

    def get_samples(self, num_samples):
        groups = [self.buffer.pop(0) for _ in self.buffer[:num_samples]]
        while len(groups) < num_samples:
            groups.append([Sample(prompt=f"{self.position}") for _ in range(self.args.n_samples_per_prompt)])
            self.position += 1
        return groups

    def add_samples(self, groups):
        self.buffer += groups


class WithState(Plain):
    counters = {"over_long_prompts": 3}

    def state_dict(self):
        return {"position": self.position, "log": self.buffer}

    def load_state_dict(self, state):
        self.position = state["position"]


class WithFiles(Plain):
    def save(self, rollout_id):
        Path(self.args.save, f"source_{rollout_id}.json").write_text(json.dumps(self.position))

    def load(self, rollout_id=None):
        self.position = json.loads(Path(self.args.save, f"source_{rollout_id}.json").read_text())


class Broken:
    def __init__(self, args):
        raise RuntimeError("no disk")


class Mute:
    def __init__(self, args): ...
'''


@pytest.fixture
def make(tmp_path, tokenizer):
    (tmp_path / "sources.py").write_text(SOURCES)

    def build(name, **options):
        path = f"{tmp_path / 'sources.py'}:{name}"
        options = {"hf_checkpoint": "m", "n_samples_per_prompt": 2, "data_source_path": path, **options}
        return make_data_source(Config.from_dict(options), tokenizer)

    return build


def ids(groups):
    return [[(s.prompt, s.group_index, s.index, s.rollout_id) for s in group] for group in groups]


def test_a_class_is_built_with_args_as_in_slime(make):
    source = make("Plain")
    assert isinstance(source, SlimeDataSource)
    assert (source.args.n_samples_per_prompt, source.position) == (2, 0)


def test_samples_without_ids_are_numbered_and_others_keep_theirs(make):
    source = make("Plain")
    assert ids(source.get_samples(2)) == [[("0", 0, 0, 0), ("0", 0, 1, 1)], [("1", 1, 2, 2), ("1", 1, 3, 3)]]
    source.add_samples([[Sample(prompt="back", group_index=7, index=70, rollout_id=9)]])
    assert ids(source.get_samples(2)) == [[("back", 7, 70, 9)], [("2", 3, 5, 5), ("2", 3, 6, 6)]]


def test_our_source_is_built_from_the_config_and_slimes_name_means_it(make, jsonl):
    path = str(jsonl({"input": "a"}))
    for name in ("lockstep.data.", "slime.rollout.data_source."):
        source = make("", data_source_path=f"{name}RolloutDataSourceWithBuffer", prompt_data=path)
        assert isinstance(source, RolloutDataSourceWithBuffer)


def test_nothing_is_needed_where_nothing_is_drawn(make):
    source = make("", data_source_path="lockstep.data.RolloutDataSourceWithBuffer")
    assert isinstance(source, NoPrompts)
    assert (source.state_dict(), source.counters) == ({}, {"malformed_rows": 0, "over_long_prompts": 0})
    with pytest.raises(OptionError, match="--prompt-data"):
        source.get_samples(1)
    with pytest.raises(OptionError, match="--num-epoch is 2"):
        source.num_rollout(2, 4)


def test_a_source_with_state_goes_on_where_the_state_was_taken(make):
    source = make("WithState", save="ckpt")
    source.get_samples(3)
    state = source.state_dict()
    later = ids(source.get_samples(2))
    resumed = make("WithState")
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert ids(resumed.get_samples(2)) == later
    assert later[0][0] == ("3", 3, 6, 6)


def test_the_state_is_a_copy(make):
    source = make("WithState")
    state = source.state_dict()
    source.buffer.append("later")
    assert state["source"] == {"position": 0, "log": []}


def test_a_source_with_files_saves_and_loads_by_rollout(make, tmp_path):
    source = make("WithFiles", save=str(tmp_path))
    source.get_samples(3)
    source.save(4)
    state = source.state_dict()
    later = ids(source.get_samples(1))
    resumed = make("WithFiles", save=str(tmp_path))
    resumed.load_state_dict(state)
    resumed.load(4)
    assert ids(resumed.get_samples(1)) == later == [[("3", 3, 6, 6), ("3", 3, 7, 7)]]


def test_a_source_that_cannot_be_saved_is_refused_before_a_run_that_is(make):
    make("Plain")
    with pytest.raises(OptionError) as caught:
        make("Plain", save="ckpt")
    assert "neither state_dict" in caught.value.reason
    assert "without --save" in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "reason"), [("Broken", "raised RuntimeError: no disk"), ("Mute", "no method get_samp")]
)
def test_a_class_that_cannot_work_is_refused(make, name, reason):
    with pytest.raises(OptionError) as caught:
        make(name)
    assert (caught.value.field, Path(caught.value.value).name) == ("--data-source-path", f"sources.py:{name}")
    assert reason in caught.value.reason


def test_a_state_that_json_cannot_hold_is_refused(make):
    source = make("WithState")
    source.add_samples([[Sample()]])
    with pytest.raises(DataError, match="not JSON"):
        source.state_dict()


def test_epochs_are_counted_by_its_length(make):
    assert make("Plain").num_rollout(3, 4) == 7
    with pytest.raises(OptionError, match="do not fill one rollout"):
        make("Plain").num_rollout(1, 11)


def test_counters_and_the_users_own_attributes_are_in_reach(make):
    source = make("WithState")
    assert source.counters == {"malformed_rows": 0, "over_long_prompts": 3}
    assert source.buffer == []
    assert copy.deepcopy(source).position == 0
    with pytest.raises(AttributeError, match="nonsense"):
        _ = source.nonsense
