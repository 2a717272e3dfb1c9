"""Conversations as token ids with a loss mask, for supervised fine-tuning: the assistant's turns are trained."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from lockstep.data.prompts import Message, UnusableValueError, render, require_chat_template
from lockstep.data.rows import excerpt
from lockstep.data.tokenizer import Tokenizer
from lockstep.errors import DataError
from lockstep.types import Sample


@dataclass(frozen=True)
class MaskedTokens:
    """Token ids of a conversation; `loss_mask` is 1 on those that are trained."""

    tokens: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)


class SftTokenizer:
    """Tokenizes what supervised fine-tuning reads.

    Every trained span is tokenized on its own, as the sampler sees it: the prompt ends where the generation prompt
    ends, the response begins a new token there and ends with the end-of-turn token (not the line break behind it).

    Args:
        end_of_turn: text that closes a response. None learns it from the chat template.
    """

    def __init__(self, tokenizer: Tokenizer, end_of_turn: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.end_of_turn = end_of_turn or learn_end_of_turn(tokenizer)

    def sample(self, sample: Sample) -> Sample:
        """A finished copy of `sample`, from its messages or from its prompt and label.

        Its response begins at the first trained token; `loss_mask` says which tokens behind that are trained.

        Raises:
            DataError: there is nothing to train on, or the chat template renders a trained turn in two ways.
        """
        where = f"sample {sample.index}"
        if isinstance(sample.prompt, str):
            if sample.label is None:
                raise DataError(where, excerpt(sample.prompt), "it has no label to train on.", "Set --label-key.")
            masked = self.pair(sample.prompt, sample.label)
        else:
            tools = sample.metadata.get("tools")
            masked = self.messages(sample.prompt, tools, sample.apply_chat_template_kwargs, where)
        prompt_length = masked.loss_mask.index(1)
        response = masked.tokens[prompt_length:]
        return replace(
            sample,
            tokens=masked.tokens,
            response_length=len(response),
            loss_mask=masked.loss_mask[prompt_length:],
            reward=0.0,
            status=Sample.Status.COMPLETED,
        )

    def pair(self, prompt: str, response: str) -> MaskedTokens:
        """A rendered prompt and the response that is trained, closed by the end-of-turn token."""
        return self._tokenize([(prompt, 0), (response + self.end_of_turn, 1)])

    def messages(
        self,
        messages: list[Message],
        tools: list[Any] | None = None,
        template_kwargs: dict[str, Any] | None = None,
        where: str = "messages",
    ) -> MaskedTokens:
        """A conversation in which assistant turns are trained, except those with `"step_loss_mask": 0`.

        What follows the last trained turn is left out: no trained token would see it.

        Raises:
            DataError: as `sample`; its field begins with `where`.
        """
        trained = [turn for turn, message in enumerate(messages) if _is_trained(message)]
        if not trained:
            raise DataError(
                where, excerpt(messages), "no assistant turn in it is trained.", "Add one, or leave the row out."
            )
        clean = [{key: value for key, value in message.items() if key != "step_loss_mask"} for message in messages]

        def rendered(num_messages: int, *, generation_prompt: bool) -> str:
            try:
                return render(
                    self.tokenizer,
                    clean[:num_messages],
                    tools,
                    template_kwargs or {},
                    generation_prompt=generation_prompt,
                )
            except UnusableValueError as error:
                raise DataError(where, excerpt(messages), str(error), "Mend the row or the chat template.") from error

        text = rendered(len(clean), generation_prompt=False)
        pieces: list[tuple[str, int]] = []
        done = 0
        for turn in trained:
            turn_name = f"{where} messages[{turn}]"
            start = _start_of_turn(text, rendered(turn, generation_prompt=True), turn_name)
            stop = self._stop(text, start, clean[turn], turn_name)
            pieces += [(text[done:start], 0), (text[start:stop], 1)]
            done = stop
        return self._tokenize(pieces)

    def _stop(self, text: str, start: int, message: Message, where: str) -> int:
        """Where the turn that begins at `start` ends, end-of-turn included."""
        if any(self.end_of_turn in str(value) for value in message.values()):
            raise DataError(
                where, excerpt(message), f"its text contains the end-of-turn {self.end_of_turn!r}.", "Take it out."
            )
        stop = text.find(self.end_of_turn, start)
        if stop < 0:
            raise DataError(
                where,
                excerpt(text[start:]),
                f"the chat template does not close this turn with {self.end_of_turn!r} as it closes others.",
                'Give the turn "step_loss_mask": 0, or mend the chat template.',
            )
        return stop + len(self.end_of_turn)

    def _tokenize(self, pieces: list[tuple[str, int]]) -> MaskedTokens:
        masked = MaskedTokens()
        for text, trained in pieces:
            tokens = self.tokenizer.encode(text, add_special_tokens=False)
            masked.tokens.extend(tokens)
            masked.loss_mask.extend([trained] * len(tokens))
        return masked


def learn_end_of_turn(tokenizer: Tokenizer) -> str:
    """What the chat template writes behind an assistant's text, such as `<|im_end|>`.

    Raises:
        DataError: there is no chat template, it fails, or it writes nothing there.
    """
    require_chat_template(tokenizer)
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        text = render(tokenizer, turns, None, {}, generation_prompt=False)
    except UnusableValueError as error:
        raise DataError("chat template", excerpt(turns), str(error), "Mend the chat template.") from error
    end = text.rpartition("answer")[2].strip()
    if not end:
        raise DataError(
            "chat template", excerpt(text), "it writes nothing to end an assistant's turn.", "Mend the chat template."
        )
    return end


def _start_of_turn(text: str, prompt: str, where: str) -> int:
    """Where a turn begins in `text`: behind the prompt that the sampler would get for it."""
    if text.startswith(prompt):
        return len(prompt)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, text, strict=False)))
    raise DataError(
        where,
        excerpt(text[same:]),
        "the chat template writes this place differently in the whole conversation and in the prompt for this turn "
        f"({excerpt(prompt[same:])!r}), so training would not match sampling.",
        'Give the turn "step_loss_mask": 0, end the conversation there, or change --apply-chat-template-kwargs.',
    )


def _is_trained(message: Message) -> bool:
    return bool(message["role"] == "assistant" and message.get("step_loss_mask", 1))
