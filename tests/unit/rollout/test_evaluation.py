"""Held-out sets: their own limits."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from lockstep.config import Config
from lockstep.rollout.evaluation import load_eval_sets


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, 4096),
        ({"rollout_max_context_len": 100}, 100),
        ({"rollout_max_context_len": 100, "eval_max_context_len": 3000}, 3000),
        ({"eval_max_context_len": 5000}, 4096),
    ],
)
def test_trainings_prompt_and_response_lengths_do_not_cut_longer_evaluation_responses(
    options: dict[str, int], wanted: int, tmp_path: Path
) -> None:
    """Training holds prompts of 8 and responses of 16 tokens; the model holds 4096."""
    rows = tmp_path / "heldout.jsonl"
    rows.write_text('{"input": "a b"}\n')
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")))
    config = Config.from_dict(
        {
            "hf_checkpoint": "model",
            "eval_prompt_data": ["heldout", str(rows)],
            "rollout_max_prompt_len": 8,
            "rollout_max_response_len": 16,
            "eval_max_response_len": 2000,
            **options,
        }
    )
    [eval_set] = load_eval_sets(config, tokenizer, 4096)
    assert eval_set.max_context_len == wanted
    assert eval_set.sampling_params["max_new_tokens"] == 2000
