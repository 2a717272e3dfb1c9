from __future__ import annotations

import pytest

from lockstep.data.chat import MaskedTokens, SftTokenizer, learn_end_of_turn
from lockstep.errors import DataError
from lockstep.types import Sample


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def trained_spans(tokenizer, masked: MaskedTokens) -> list[str]:
    """The text of every run of trained tokens."""
    assert len(masked.tokens) == len(masked.loss_mask)
    spans, run = [], []
    for token, mask in zip([*masked.tokens, 0], [*masked.loss_mask, 0], strict=True):
        if mask:
            run.append(token)
        elif run:
            spans.append(tokenizer.decode(run))
            run = []
    return spans


@pytest.fixture
def sft(tokenizer):
    return SftTokenizer(tokenizer)


def test_the_end_of_turn_is_learned_from_the_template(tokenizer, plain_tokenizer):
    assert learn_end_of_turn(tokenizer) == "<|im_end|>"
    with pytest.raises(DataError, match="chat template: "):
        learn_end_of_turn(plain_tokenizer)


def test_a_template_that_does_not_end_turns_is_refused(plain_tokenizer):
    plain_tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    with pytest.raises(DataError, match="writes nothing to end an assistant's turn"):
        SftTokenizer(plain_tokenizer)


def test_a_template_that_fails_is_refused(plain_tokenizer):
    plain_tokenizer.chat_template = "{{ raise_exception('only for images') }}"
    with pytest.raises(DataError, match=r"the chat template cannot render it \(only for images\)"):
        SftTokenizer(plain_tokenizer)


def test_only_assistant_turns_are_trained_with_their_end(sft, tokenizer):
    masked = sft.messages(
        turns(
            ("system", "s"),
            ("user", "q"),
            ("assistant", "<think>\nt\n</think>\n\nfirst"),
            ("user", "p"),
            ("assistant", "second"),
        )
    )
    assert trained_spans(tokenizer, masked) == ["first<|im_end|>", "<think>\n\n</think>\n\nsecond<|im_end|>"]
    assert tokenizer.decode(masked.tokens) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nfirst<|im_end|>\n"
        "<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nsecond<|im_end|>"
    )


def test_tool_turns_are_not_trained_and_thinking_between_them_is(sft, tokenizer):
    call, answer = "<think>\nlook\n</think>\n\ncall", "<think>\ngot\n</think>\n\ndone"
    tools = [{"type": "function", "function": {"name": "look"}}]
    masked = sft.messages(turns(("user", "q"), ("assistant", call), ("tool", "42"), ("assistant", answer)), tools)
    assert trained_spans(tokenizer, masked)[0] == call + "<|im_end|>"
    assert '"look"' in tokenizer.decode(masked.tokens)


def test_a_masked_turn_is_context_only(sft, tokenizer):
    messages = turns(("user", "q"), ("assistant", "first"), ("user", "p"), ("assistant", "second"), ("user", "thanks"))
    messages[1]["step_loss_mask"] = 0
    messages[3]["step_loss_mask"] = 1
    masked = sft.messages(messages)
    assert trained_spans(tokenizer, masked) == ["second<|im_end|>"]
    text = tokenizer.decode(masked.tokens)
    assert "first" in text
    assert "thanks" not in text  # no trained token sees what comes after it


def test_the_prompt_is_tokenized_as_the_sampler_gets_it(sft, tokenizer):
    """Even where a tokenizer would merge the prompt's last character with the response's first."""
    question = turns(("user", "q"))
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    masked = sft.messages([*question, *turns(("assistant", "a"))])
    prompt_tokens = tokenizer.encode(prompt, add_special_tokens=False)
    assert masked.tokens[: len(prompt_tokens)] == prompt_tokens
    assert masked.loss_mask.index(1) == len(prompt_tokens)


def test_a_turn_that_the_template_renders_in_two_ways_is_refused(sft, tokenizer):
    messages = turns(("user", "q"), ("assistant", "first"), ("user", "p"), ("assistant", "second"))
    kwargs = {"thinking_prompt": True}
    with pytest.raises(DataError) as caught:
        sft.messages(messages, None, kwargs, "sample 3")
    assert caught.value.field == "sample 3 messages[1]"
    assert caught.value.value.startswith("first<|im_end|>")
    assert "('<think>\\n')" in caught.value.reason
    assert '"step_loss_mask": 0' in caught.value.remedy
    messages[1]["step_loss_mask"] = 0
    masked = sft.messages(messages, None, kwargs)
    assert trained_spans(tokenizer, masked) == ["\n</think>\n\nsecond<|im_end|>"]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (turns(("user", "q")), "no assistant turn in it is trained"),
        ([{"role": "assistant", "content": "a", "step_loss_mask": 0}], "no assistant turn in it is trained"),
        (turns(("user", "q"), ("assistant", "a<|im_end|>b")), "its text contains the end-of-turn '<|im_end|>'"),
        (turns(("user", "q"), ("wizard", "a"), ("assistant", "b")), "cannot render it (unknown role wizard)"),
    ],
)
def test_an_untrainable_conversation_says_why(sft, messages, reason):
    with pytest.raises(DataError) as caught:
        sft.messages(messages)
    assert reason in caught.value.reason


def test_a_turn_without_end_is_refused(plain_tokenizer):
    plain_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% if loop.length == 2 %}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(DataError, match=r"does not close this turn with '<\|im_end\|>'"):
        SftTokenizer(plain_tokenizer).messages(turns(("user", "q"), ("assistant", "a"), ("user", "p")))


def test_a_conversation_becomes_a_finished_sample(sft, tokenizer):
    messages = turns(("user", "q"), ("assistant", "first"), ("user", "p"), ("assistant", "<think>x</think>second"))
    before = Sample(index=4, prompt=messages, label="l")
    after = sft.sample(before)
    assert tokenizer.decode(after.tokens[after.prompt_length :]).startswith("first<|im_end|>\n<|im_start|>user")
    assert len(after.loss_mask) == after.response_length
    assert after.effective_response_length == (5 + 1) + (1 + 1 + 1 + 6 + 1)
    assert (after.status, after.reward, after.index, after.label) == (Sample.Status.COMPLETED, 0.0, 4, "l")
    assert before.tokens == []


def test_a_prompt_and_its_label_become_a_finished_sample(sft, tokenizer):
    sample = sft.sample(Sample(prompt="<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n", label="2"))
    assert tokenizer.decode(sample.tokens[sample.prompt_length :]) == "2<|im_end|>"
    assert sample.loss_mask == [1, 1]
    with pytest.raises(DataError, match="it has no label to train on"):
        sft.sample(Sample(prompt="text"))


def test_without_a_chat_template_the_end_can_be_given(plain_tokenizer):
    masked = SftTokenizer(plain_tokenizer, end_of_turn="<|endoftext|>").pair("1+1=", "2")
    assert plain_tokenizer.decode(masked.tokens) == "1+1=2<|endoftext|>"
    assert masked.loss_mask == [0, 0, 0, 0, 1, 1]
