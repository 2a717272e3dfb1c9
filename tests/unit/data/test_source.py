from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lockstep.config import Config
from lockstep.data.prompts import PromptFormat, PromptReader
from lockstep.data.rows import MalformedRowError
from lockstep.data.source import PromptStream, RolloutDataSourceWithBuffer, epoch_order
from lockstep.errors import DataError, OptionError
from lockstep.types import Sample

SHUFFLED = {"rollout_shuffle": True, "rollout_seed": 7}


@pytest.fixture
def source(jsonl, tokenizer):
    """Makes a source over rows that are prompts, or objects, or text as it stands."""

    def make(rows, *, samples=1, buffer_filter=None, args=None, **stream):
        path = jsonl(*({"input": row} if not isinstance(row, dict | str) or row[:1] != "{" else row for row in rows))
        prompts = PromptStream(PromptReader(path, tokenizer, PromptFormat()), **stream)
        return RolloutDataSourceWithBuffer(
            prompts, n_samples_per_prompt=samples, buffer_filter=buffer_filter, args=args
        )

    return make


def drawn(source, count):
    return [group[0].prompt for group in source.get_samples(count)]


def test_groups_carry_consecutive_ids(source):
    groups = source(["a", "b"], samples=3).get_samples(2)
    assert [[s.prompt for s in group] for group in groups] == [["a"] * 3, ["b"] * 3]
    assert [[s.group_index for s in group] for group in groups] == [[0] * 3, [1] * 3]
    assert [[s.index for s in group] for group in groups] == [[0, 1, 2], [3, 4, 5]]
    assert [[s.rollout_id for s in group] for group in groups] == [[0, 1, 2], [3, 4, 5]]


def test_siblings_share_nothing(source):
    first, second = source(['{"input": "a", "metadata": {"list": [1]}}'], samples=2).get_samples(1)[0]
    first.metadata["list"].append(2)
    assert second.metadata == {"list": [1]}


def test_one_call_crosses_epoch_borders_without_dropping_a_row(source):
    assert drawn(source(["a", "b", "c"]), 8) == ["a", "b", "c", "a", "b", "c", "a", "b"]


def test_each_shuffled_epoch_is_a_permutation_of_its_own(source):
    prompts = [f"p{i}" for i in range(20)]
    epochs = [drawn(shuffled := source(prompts, **SHUFFLED), 20), drawn(shuffled, 20)]
    assert [sorted(epoch) for epoch in epochs] == [sorted(prompts)] * 2
    assert len({tuple(epoch) for epoch in [*epochs, prompts]}) == 3
    assert epochs[1] == [prompts[i] for i in epoch_order(20, 7, 1)]
    assert drawn(source(prompts, rollout_shuffle=True, rollout_seed=8), 20) != epochs[0]


def test_the_order_is_fixed_by_seed_and_epoch_alone():
    """Frozen values: a change here would silently reorder the data of every resumed run."""
    assert epoch_order(8, 42, 0).tolist() == [7, 1, 6, 4, 3, 5, 0, 2]
    assert epoch_order(8, 42, 1).tolist() == [4, 5, 3, 0, 2, 7, 1, 6]
    assert epoch_order(8, -1, 0).tolist() == [0, 7, 4, 2, 6, 3, 1, 5]


def test_shuffling_neither_reads_nor_moves_the_global_generators(source):
    prompts = [f"p{i}" for i in range(9)]
    first = drawn(source(prompts, **SHUFFLED), 12)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert drawn(source(prompts, **SHUFFLED), 12) == first
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


def test_over_long_prompts_are_counted_and_never_drawn(source):
    long_and_short = source(["12345678", "1234", "12345", "1"], rollout_max_prompt_len=4)
    assert drawn(long_and_short, 5) == ["1234", "1", "1234", "1", "1234"]
    assert long_and_short.counters == {"malformed_rows": 0, "over_long_prompts": 5}


def test_an_epoch_of_over_long_prompts_is_an_error(source):
    hopeless = source(["12345"] * 3, rollout_max_prompt_len=4, **SHUFFLED)
    with pytest.raises(
        DataError, match=r"data\.jsonl is '3 rows': none of them is usable: prompts are longer than 4 tokens"
    ):
        hopeless.get_samples(1)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 12), draws=st.integers(0, 30))
def test_a_single_usable_row_is_always_found(source, seed, rows, draws):
    """However shuffling places it in two epochs that follow each other."""
    prompts = ["ok"] + ["too long"] * (rows - 1)
    assert (
        drawn(source(prompts, rollout_max_prompt_len=2, rollout_shuffle=True, rollout_seed=seed), draws)
        == ["ok"] * draws
    )


def test_message_lists_skip_the_length_filter_with_one_warning(source, caplog):
    messages = [{"role": "user", "content": "far too long"}]
    with caplog.at_level(logging.WARNING):
        assert drawn(source([messages, messages], rollout_max_prompt_len=1), 4) == [messages] * 4
    assert [record.message for record in caplog.records] == [
        "Prompts that stay message lists are not measured against --rollout-max-prompt-len."
    ]


def test_a_malformed_row_stops_the_run(source):
    stopping = source(["a", "{oops", "b"])
    assert drawn(stopping, 1) == ["a"]
    with pytest.raises(MalformedRowError, match=r"data\.jsonl:2 is"):
        stopping.get_samples(1)


def test_malformed_rows_can_be_skipped_and_counted(source, caplog):
    skipping = source(["a", "{oops", "b", '{"wrong": 1}'], skip_malformed_rows=True)
    with caplog.at_level(logging.WARNING):
        assert drawn(skipping, 5) == ["a", "b", "a", "b", "a"]
    assert skipping.counters == {"malformed_rows": 4, "over_long_prompts": 0}
    assert len(caplog.records) == 1
    assert "data.jsonl:2" in caplog.text


def test_nothing_but_malformed_rows_is_an_error(source):
    with pytest.raises(DataError, match=r"rows are malformed\. Run without --skip-malformed-rows"):
        source(["{oops", '{"wrong": 1}'], skip_malformed_rows=True).get_samples(1)


def test_returned_groups_come_first_and_first_in_first_out(source):
    buffered = source(["a", "b", "c"], samples=2)
    first, second, third = buffered.get_samples(3)
    first[0].tokens = [1, 2]
    buffered.add_samples([second])
    buffered.add_samples([first, third])
    assert buffered.get_samples(1)[0] is second
    groups = buffered.get_samples(3)
    assert groups[0] is first
    assert groups[1] is third
    assert [sample.index for sample in groups[2]] == [6, 7]
    assert drawn(buffered, 1) == ["b"]


def test_a_buffer_filter_picks_and_the_rest_is_new(source):
    calls = []

    def longest(args, rollout_id, buffer, num_samples):
        calls.append((args, rollout_id, len(buffer), num_samples))
        return [buffer.pop(max(range(len(buffer)), key=lambda i: len(buffer[i][0].tokens)))]

    filtered = source(["a", "b", "c", "d"], buffer_filter=longest, args="args")
    groups = filtered.get_samples(2)
    groups[1][0].tokens = [1, 2, 3]
    filtered.add_samples(groups)
    assert drawn(filtered, 2) == ["b", "c"]
    assert [group[0].prompt for group in filtered.buffer] == ["a"]
    filtered.get_samples(1, rollout_id=5)
    assert drawn(filtered, 1) == ["d"]
    assert calls == [("args", None, 2, 2), ("args", 5, 1, 1)]


@pytest.mark.parametrize(("answer", "found"), [([1, 2], "2 groups"), (None, "NoneType")])
def test_a_buffer_filter_that_breaks_its_promise_is_named(source, answer, found):
    broken = source(["a"], buffer_filter=lambda args, rollout_id, buffer, n: answer)
    broken.add_samples(broken.get_samples(1))
    with pytest.raises(
        DataError, match=f"--buffer-filter-path is '{found}': it must return a list of at most 1 groups"
    ):
        broken.get_samples(1)


@pytest.mark.parametrize("groups", [[[]], [["text"]]])
def test_only_groups_of_samples_can_be_returned(source, groups):
    with pytest.raises(DataError, match="a group is a list of at least one Sample"):
        source(["a"]).add_samples(groups)


ACTIONS = st.lists(st.tuples(st.sampled_from(["draw", "return"]), st.integers(0, 5)), max_size=12)


def play(source: RolloutDataSourceWithBuffer, actions: list[tuple[str, int]]) -> list[list[dict]]:
    """Draw groups, work on them a little, give some back: every drawn sample as plain values."""
    seen, held = [], []
    for action, count in actions:
        if action == "draw":
            groups = source.get_samples(count)
            seen += [[sample.to_dict() for sample in group] for group in groups]
            held += groups
        else:
            for group in held[:count]:
                group[0].tokens = [*group[0].tokens, len(seen)]
            source.add_samples(held[:count])
            held = held[count:]
    return seen


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(before=ACTIONS, after=ACTIONS, shuffle=st.booleans(), seed=st.integers(0, 99))
def test_a_resumed_source_continues_as_if_never_stopped(source, before, after, shuffle, seed):
    rows = ["a", "long", "b", "{oops", "c", "d"]
    options = {
        "rollout_shuffle": shuffle,
        "rollout_seed": seed,
        "rollout_max_prompt_len": 3,
        "skip_malformed_rows": True,
    }
    running, resumed = (source(rows, samples=2, **options) for _ in range(2))
    play(running, before)
    resumed.load_state_dict(json.loads(json.dumps(running.state_dict())))
    assert resumed.state_dict() == running.state_dict()
    assert play(resumed, after) == play(running, after)
    assert resumed.state_dict() == running.state_dict()
    assert resumed.counters == running.counters


def test_the_state_is_a_copy(source):
    buffered = source(["a", "b"])
    buffered.add_samples(buffered.get_samples(1))
    state = json.dumps(buffered.state_dict())
    held = buffered.state_dict()
    buffered.buffer[0][0].tokens.append(1)
    buffered.get_samples(2)
    assert json.dumps(held) == state


def test_routed_experts_in_the_buffer_survive_a_resume(source):
    running, resumed = source(["a"]), source(["a"])
    experts = np.array([[[3, 1]], [[0, 2]]], dtype=np.int16)
    running.add_samples([[Sample(index=9, rollout_routed_experts=experts)]])
    resumed.load_state_dict(json.loads(json.dumps(running.state_dict())))
    (sample,) = resumed.get_samples(1)[0]
    assert sample.rollout_routed_experts.dtype == np.int16
    np.testing.assert_array_equal(sample.rollout_routed_experts, experts)


@pytest.mark.parametrize(
    ("options", "rows", "named"),
    [
        ({}, ["a", "b", "c"], "number of rows is 3: .* with 2"),
        (SHUFFLED, ["a", "b"], "--rollout-shuffle is True: .* with False"),
    ],
)
def test_a_state_of_other_data_is_refused(source, options, rows, named):
    state = source(["a", "b"]).state_dict()
    with pytest.raises(DataError, match=named):
        source(rows, **options).load_state_dict(state)


def test_another_seed_is_refused_only_where_it_matters(source):
    state = source(["a"], rollout_seed=1).state_dict()
    source(["a"], rollout_seed=2).load_state_dict(state)
    state = source(["a"], rollout_shuffle=True, rollout_seed=1).state_dict()
    with pytest.raises(DataError, match="--rollout-seed is 2"):
        source(["a"], rollout_shuffle=True, rollout_seed=2).load_state_dict(state)


def test_epochs_become_rollouts(source):
    ten = source(["a"] * 10)
    assert len(ten) == 10
    assert [ten.num_rollout(epochs, 4) for epochs in (1, 2, 3)] == [2, 5, 7]
    with pytest.raises(OptionError, match="--num-epoch is 1: 10 rows do not fill one rollout of 16 prompts"):
        ten.num_rollout(1, 16)


def pick_nothing(args, rollout_id, buffer, num_samples):
    return []


def test_the_source_is_built_from_the_options(jsonl, tokenizer):
    path = jsonl({"q": "hello"}, {"q": "hi"}, {"q": "yo"})
    options = {
        "hf_checkpoint": "model",
        "prompt_data": f"{path}@[:2]",
        "input_key": "q",
        "n_samples_per_prompt": 2,
        "rollout_max_prompt_len": 3,
        "rollout_shuffle": True,
        "rollout_seed": 3,
        "buffer_filter_path": f"{Path(__file__)}:pick_nothing",
    }
    built = RolloutDataSourceWithBuffer.from_config(Config.from_dict(options), tokenizer)
    assert len(built) == 2
    built.add_samples(built.get_samples(1))
    assert [[sample.prompt for sample in group] for group in built.get_samples(2)] == [["hi", "hi"]] * 2
    assert len(built.buffer) == 1
    assert built.args.rollout_seed == 3
    assert built.prompts.rollout_seed == 3


def test_a_wrong_key_is_found_before_the_run_begins(jsonl, tokenizer):
    path = jsonl({"prompt": "a"})
    with pytest.raises(MalformedRowError, match=r"no key 'input' \(--input-key\), the row has \['prompt'\]"):
        RolloutDataSourceWithBuffer.from_config(
            Config.from_dict({"hf_checkpoint": "model", "prompt_data": str(path)}), tokenizer
        )
    with pytest.raises(OptionError, match="there is nothing to train on"):
        RolloutDataSourceWithBuffer.from_config(Config.from_dict({"hf_checkpoint": "model"}), tokenizer)
