from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

# ChatML with the habits of Qwen3's template: thinking is dropped from turns before the last question, and the closing
# turn gets an empty thinking block. `thinking_prompt` opens the block for the sampler, as thinking-only models do.
TEMPLATE = """
{%- set ns = namespace(question=-1) -%}
{%- for m in messages if m.role == 'user' -%}{%- set ns.question = messages.index(m) -%}{%- endfor -%}
{%- if tools -%}{{ '<|im_start|>system\\n' }}{{ tools | tojson }}{{ '<|im_end|>\\n' }}{%- endif -%}
{%- for m in messages -%}
  {%- if m.role not in ['system', 'user', 'assistant', 'tool'] -%}
    {{- raise_exception('unknown role ' + m.role) -}}
  {%- endif -%}
  {{- '<|im_start|>' + m.role + '\\n' -}}
  {%- if m.role == 'assistant' -%}
    {%- set answer = m.content.split('</think>')[-1].lstrip() -%}
    {%- if loop.last and loop.index0 > ns.question and '</think>' not in m.content -%}
      {{- '<think>\\n\\n</think>\\n\\n' + answer -}}
    {%- elif loop.index0 > ns.question -%}
      {{- m.content -}}
    {%- else -%}
      {{- answer -}}
    {%- endif -%}
  {%- else -%}
    {{- m.content -}}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
  {%- if thinking_prompt -%}{{- '<think>\\n' -}}{%- endif -%}
{%- endif -%}
"""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, plus the special ones, so that lengths and spans can be counted by hand."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture
def plain_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same without a chat template."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows (objects, or text as it stands) to a .jsonl file."""

    def write(*rows: Any, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write
