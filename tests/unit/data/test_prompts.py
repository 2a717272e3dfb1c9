from __future__ import annotations

import pytest

from lockstep.config import Config
from lockstep.data.prompts import PromptFormat, PromptReader
from lockstep.data.rows import MalformedRowError
from lockstep.errors import DataError, OptionError

TOOL = {"type": "function", "function": {"name": "add"}}


def test_a_row_becomes_a_sample(jsonl, tokenizer):
    path = jsonl({"prompt": "2+2=", "answer": "4", "metadata": {"rm_type": "math"}, "other": 1})
    sample = PromptReader(path, tokenizer, PromptFormat(input_key="prompt", label_key="answer"))[0]
    assert (sample.prompt, sample.label, sample.metadata) == ("2+2=", "4", {"rm_type": "math"})
    assert (sample.index, sample.tokens, sample.status.value) == (None, [], "pending")


def test_a_text_prompt_is_rendered_as_one_user_message(jsonl, tokenizer):
    reader = PromptReader(jsonl({"input": "hi"}), tokenizer, PromptFormat(apply_chat_template=True))
    assert reader[0].prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_messages_are_rendered_with_tools_and_kwargs(jsonl, tokenizer):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    path = jsonl({"input": messages, "tools": [TOOL], "metadata": {"thinking_prompt": False, "tools": "mine"}})
    kwargs = {"thinking_prompt": True}
    sample = PromptReader(path, tokenizer, PromptFormat(apply_chat_template=True, apply_chat_template_kwargs=kwargs))[0]
    assert sample.prompt == (
        '<|im_start|>system\n[{"type": "function", "function": {"name": "add"}}]<|im_end|>\n'
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    assert sample.metadata["tools"] == [TOOL]
    assert sample.apply_chat_template_kwargs == kwargs


def test_tools_may_be_json_text(jsonl, plain_tokenizer):
    path = jsonl(
        {"input": "a", "tools": '[{"type": "function", "function": {"name": "add"}}]'}, {"input": "a", "tools": ""}
    )
    reader = PromptReader(path, plain_tokenizer, PromptFormat())
    assert [sample.metadata for sample in (reader[0], reader[1])] == [{"tools": [TOOL]}, {}]


def test_without_the_template_prompts_pass_as_they_are(jsonl, plain_tokenizer):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    messages = [{"role": "user", "content": "hi", "step_loss_mask": 0}, call]
    reader = PromptReader(jsonl({"input": messages}, {"input": "<b> "}), plain_tokenizer, PromptFormat())
    assert [reader[0].prompt, reader[1].prompt] == [messages, "<b> "]


@pytest.mark.parametrize(
    ("label", "expected"),
    [("34", "34"), ("", ""), (34, "34"), (0.5, "0.5"), (12345678901234567890, "12345678901234567890"), (None, None)],
)
def test_labels_become_text(jsonl, tokenizer, label, expected):
    path = jsonl({"input": "a", "label": label})
    assert PromptReader(path, tokenizer, PromptFormat(label_key="label"))[0].label == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "label": "b"}, r"there is no key 'input' \(--input-key\), the row has \['label', 'prompt'\]"),
        ({"input": "a"}, r"there is no key 'label' \(--label-key\), the row has \['input'\]"),
        ({"input": None, "label": "b"}, r"'input' must be a string or a list of messages, it is null"),
        ({"input": 3, "label": "b"}, r"'input' must be a string or a list of messages, it is int \(3\)"),
        ({"input": [], "label": "b"}, r"'input' is empty"),
        ({"input": "", "label": "b"}, r"'input' is empty"),
        ({"input": ["a"], "label": "b"}, r"input\[0\] must be an object with a role"),
        (
            {"input": [{"role": "user", "content": "a"}, {"content": "b"}], "label": "b"},
            r"input\[1\] must be an object with",
        ),
        ({"input": "a", "label": ["b"]}, r"label 'label' must be a string or a number, it is a list"),
        ({"input": "a", "label": True}, r"label 'label' must be a string or a number, it is a boolean"),
        ({"input": "a", "label": "b", "metadata": "x"}, r"'metadata' must be an object, it is a string \(x\)"),
        ({"input": "a", "label": "b", "tools": "{oops"}, r"'tools' is a string that is not JSON"),
        ({"input": "a", "label": "b", "tools": {"name": "add"}}, r"'tools' must be a list of objects"),
        ({"input": [{"role": "wizard", "content": "a"}], "label": "b"}, r"cannot render it \(unknown role wizard\)"),
        ({"input": [{"role": "user"}], "label": "b"}, r"input\[0\] has neither content nor tool_calls"),
        (
            {"input": [{"role": "user", "content": "a"}, {"role": "assistant", "content": 3}], "label": "b"},
            "cannot render",
        ),
    ],
)
def test_an_unusable_row_says_where_and_why(jsonl, tokenizer, row, reason):
    path = jsonl({"input": "fine", "label": "b"}, row)
    reader = PromptReader(path, tokenizer, PromptFormat(label_key="label", apply_chat_template=True))
    with pytest.raises(MalformedRowError, match=reason) as caught:
        reader[1]
    assert caught.value.field == f"{path}:2"


def test_a_tokenizer_without_chat_template_is_refused_before_any_row(jsonl, plain_tokenizer):
    with pytest.raises(
        DataError, match=r"chat template: the tokenizer of --hf-checkpoint has none.*drop --apply-chat-template"
    ):
        PromptReader(jsonl("{broken"), plain_tokenizer, PromptFormat(apply_chat_template=True))


def test_template_kwargs_cannot_replace_what_the_data_source_sets():
    with pytest.raises(OptionError, match=r"\['add_generation_prompt', 'tokenize'\] are set by the data source"):
        PromptFormat(apply_chat_template_kwargs={"tokenize": True, "add_generation_prompt": False, "x": 1})


def test_the_format_is_read_from_the_options():
    options = {
        "input_key": "prompt",
        "label_key": "label",
        "metadata_key": "meta",
        "tool_key": "functions",
        "apply_chat_template": True,
        "apply_chat_template_kwargs": {"enable_thinking": False},
    }
    assert PromptFormat.from_config(Config.from_dict({**options, "hf_checkpoint": "model"})) == PromptFormat(**options)
