"""Samples are kept whole per rollout; a page embeds an even, bounded part of them."""

from __future__ import annotations

import json

import pytest

from lockstep.errors import DataError
from lockstep.report.samples import samples_path, select_samples, spread, write_samples


def record(step=0, group=0, index=0, num_tokens=3, **fields):
    tokens = [f"t{position} " for position in range(num_tokens)]
    return {
        "step": step,
        "group_index": group,
        "index": index,
        "prompt": "1+1",
        "response": "".join(tokens),
        "label": "2",
        "reward": 1.0,
        "advantage": 0.5,
        "status": "completed",
        "response_tokens": tokens,
        "rollout_log_probs": [-0.25] * num_tokens,
        "policy_log_probs": [-0.5] * num_tokens,
        "loss_mask": [1] * num_tokens,
        "eval": None,
        **fields,
    }


def write_groups(run_dir, step, num_groups, group_size, **fields):
    write_samples(
        run_dir,
        step,
        [record(step, g, g * group_size + i, **fields) for g in range(num_groups) for i in range(group_size)],
    )


def test_a_rollout_is_one_file_of_one_record_a_line(tmp_path):
    path = write_samples(tmp_path, 12, [record(12, index=1), record(12, index=2, response="Ünïcode\u2028\ud800\n")])
    assert path == tmp_path / "samples" / "0000012.jsonl" == samples_path(tmp_path, 12)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["index"] for row in rows] == [1, 2]
    assert rows[1]["response"] == "Ünïcode\u2028\ud800\n"


def test_log_probs_keep_every_digit_of_fp32(tmp_path):
    value = -0.12345678780627
    path = write_samples(tmp_path, 0, [record(num_tokens=1, rollout_log_probs=[value], policy_log_probs=[-1.0])])
    assert json.loads(path.read_text())["rollout_log_probs"] == [-0.123456788]


def test_a_resumed_rollout_replaces_its_file_and_a_failed_write_leaves_it(tmp_path):
    write_samples(tmp_path, 0, [record(index=1)])
    write_samples(tmp_path, 0, [record(index=2)])
    with pytest.raises(TypeError):
        write_samples(tmp_path, 0, [record(index=3), record(label=object())])
    assert [row["index"] for row in select_samples(tmp_path).records] == [2]


def test_a_run_within_the_bounds_is_shown_whole(tmp_path):
    for step in range(3):
        write_groups(tmp_path, step, num_groups=2, group_size=4)
    selection = select_samples(tmp_path)
    assert (len(selection.records), selection.num_samples, selection.num_steps) == (24, 24, 3)
    assert selection.is_complete


def test_a_longer_run_is_shown_by_whole_groups_evenly_over_steps(tmp_path):
    for step in range(21):
        write_groups(tmp_path, step, num_groups=10, group_size=4)
    selection = select_samples(tmp_path, max_steps=5, max_samples=50)
    shown = {}
    for kept in selection.records:
        shown.setdefault(kept["step"], []).append(kept["group_index"])
    assert list(shown) == [0, 5, 10, 15, 20]
    assert all(groups == [0] * 4 + [9] * 4 for groups in shown.values()), "2 of 10 groups fit into 10 samples a step"
    assert not selection.is_complete
    assert selection.num_samples == 840


def test_a_response_beyond_the_bound_is_cut_and_says_so(tmp_path):
    write_groups(tmp_path, 0, num_groups=1, group_size=2, num_tokens=1000)
    selection = select_samples(tmp_path, max_samples=2, max_characters=2_000)
    for kept in selection.records:
        num_kept = len(kept["response_tokens"])
        assert 0 < num_kept < 1000
        assert kept["cut_tokens"] == 1000 - num_kept
        assert kept["response"] == "".join(kept["response_tokens"])
        assert len(kept["rollout_log_probs"]) == len(kept["policy_log_probs"]) == len(kept["loss_mask"]) == num_kept
    assert not selection.is_complete


def test_a_run_without_samples_selects_none(tmp_path):
    assert select_samples(tmp_path).records == []


@pytest.mark.parametrize("line", ["{", "[]", '{"step": 1, "prompt": "p"}'])
def test_an_unusable_line_is_named(tmp_path, line):
    path = write_samples(tmp_path, 3, [record(3)])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"0000003.jsonl:2 is .* with step, prompt, response"):
        select_samples(tmp_path)


@pytest.mark.parametrize(
    ("size", "count", "expected"), [(3, 5, [0, 1, 2]), (11, 3, [0, 5, 10]), (9, 1, [0]), (0, 4, [])]
)
def test_spread_takes_the_ends_and_even_steps(size, count, expected):
    assert spread(range(size), count) == expected
