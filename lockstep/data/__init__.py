"""Prompts from .jsonl and .parquet files, chat templates, and the buffer in front of them."""

from __future__ import annotations

from lockstep.data.chat import MaskedTokens, SftTokenizer
from lockstep.data.eval_samples import load_eval_samples
from lockstep.data.prompts import PromptFormat, PromptReader
from lockstep.data.rows import MalformedRowError, RowReader, open_rows
from lockstep.data.sample_json import sample_from_json, sample_to_json
from lockstep.data.source import PromptStream, RolloutDataSourceWithBuffer, epoch_order
from lockstep.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "MalformedRowError",
    "MaskedTokens",
    "PromptFormat",
    "PromptReader",
    "PromptStream",
    "RolloutDataSourceWithBuffer",
    "RowReader",
    "SftTokenizer",
    "Tokenizer",
    "epoch_order",
    "load_eval_samples",
    "load_tokenizer",
    "open_rows",
    "sample_from_json",
    "sample_to_json",
]
