from __future__ import annotations

import logging

import pytest

from lockstep.data.eval_samples import load_eval_samples
from lockstep.data.prompts import PromptFormat
from lockstep.data.rows import MalformedRowError
from lockstep.errors import DataError


def test_every_prompt_is_sampled_n_times_in_file_order(jsonl, tokenizer):
    path = jsonl(*({"input": text, "metadata": {"list": []}} for text in "abc"))
    samples = load_eval_samples(f"{path}@[1:]", tokenizer, PromptFormat(), n_samples_per_eval_prompt=2)
    assert [(s.prompt, s.group_index, s.index, s.rollout_id) for s in samples] == [
        ("b", 0, 0, 0),
        ("b", 0, 1, 1),
        ("c", 1, 2, 2),
        ("c", 1, 3, 3),
    ]
    samples[0].metadata["list"].append(1)
    assert samples[1].metadata == {"list": []}


def test_overrides_win_over_the_row(jsonl, tokenizer):
    path = jsonl({"input": "a", "metadata": {"rm_type": "math", "x": 1}})
    (sample,) = load_eval_samples(path, tokenizer, PromptFormat(), metadata_overrides={"rm_type": "f1"})
    assert sample.metadata == {"rm_type": "f1", "x": 1}


def test_what_is_left_out_is_logged(jsonl, tokenizer, caplog):
    path = jsonl({"input": "12345"}, {"input": "ok"}, "{oops")
    options = {"eval_max_prompt_len": 3, "skip_malformed_rows": True}
    with caplog.at_level(logging.WARNING):
        samples = load_eval_samples(path, tokenizer, PromptFormat(), **options)
    assert [sample.prompt for sample in samples] == ["ok"]
    assert "evaluating 1 of 3 prompts, left out: 1 over_long_prompts, 1 malformed_rows" in caplog.text


def test_bad_rows_stop_unless_skipped(jsonl, tokenizer):
    with pytest.raises(MalformedRowError, match=r"data\.jsonl:2"):
        load_eval_samples(jsonl({"input": "ok"}, "{oops"), tokenizer, PromptFormat())
    with pytest.raises(DataError, match="prompts are longer than 1 tokens"):
        load_eval_samples(jsonl({"input": "ok"}), tokenizer, PromptFormat(), eval_max_prompt_len=1)
