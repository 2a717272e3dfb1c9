from __future__ import annotations

import logging

import pytest

from lockstep.data.tokenizer import load_tokenizer
from lockstep.errors import DataError


def test_a_saved_tokenizer_is_loaded_from_its_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = load_tokenizer(tmp_path / "model")
    text = loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert loaded.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)


def test_transformers_does_not_chat(tokenizer, tmp_path, monkeypatch, caplog):
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(logging.getLogger("transformers"), "level", logging.WARNING)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    loaded = load_tokenizer(tmp_path / "model")
    loaded.model_max_length = 1
    loaded.encode("longer than the maximum")
    assert caplog.records == []


def test_a_folder_without_a_usable_tokenizer_says_why(tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tokenizer.json").write_text("{")
    (tmp_path / "file").write_text("")
    reasons = {
        "missing": "there is no such folder",
        "file": "there is no such folder",
        "none": "it holds no tokenizer",
        "broken": "its tokenizer cannot be loaded",
    }
    for name, reason in reasons.items():
        with pytest.raises(DataError) as caught:
            load_tokenizer(tmp_path / name)
        assert reason in caught.value.reason, name
        assert caught.value.field == "--hf-checkpoint"
        assert caught.value.remedy


def test_a_hub_name_is_not_downloaded():
    with pytest.raises(DataError, match="nothing is downloaded"):
        load_tokenizer("Qwen/Qwen3-0.6B")
