"""One row becomes one `Sample`: keys, types, tools and the chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import jinja2

from lockstep.config import Config
from lockstep.data.rows import MalformedRowError, Row, excerpt, open_rows
from lockstep.data.tokenizer import Tokenizer
from lockstep.errors import DataError, OptionError
from lockstep.types import Sample

Message = dict[str, Any]

RESERVED_TEMPLATE_KWARGS = {"tokenize", "add_generation_prompt", "tools", "conversation", "return_dict"}


@dataclass(frozen=True)
class PromptFormat:
    """Which keys of a row mean what, and whether its prompt goes through the chat template."""

    input_key: str = "input"
    label_key: str | None = None
    metadata_key: str = "metadata"
    tool_key: str = "tools"
    apply_chat_template: bool = False
    apply_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Config) -> PromptFormat:
        return cls(**{option.name: getattr(config.data, option.name) for option in fields(cls)})

    def __post_init__(self) -> None:
        if reserved := RESERVED_TEMPLATE_KWARGS & set(self.apply_chat_template_kwargs):
            raise OptionError(
                "--apply-chat-template-kwargs",
                self.apply_chat_template_kwargs,
                f"{sorted(reserved)} are set by the data source itself.",
                "Leave them out.",
            )


class PromptReader:
    """A data file as `Sample`s without ids, each made when asked for."""

    def __init__(self, prompt_data: str | Path, tokenizer: Tokenizer, prompt_format: PromptFormat) -> None:
        if prompt_format.apply_chat_template:
            require_chat_template(tokenizer)
        self.prompt_data = str(prompt_data)
        self.rows = open_rows(prompt_data)
        self.tokenizer = tokenizer
        self.format = prompt_format

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """
        Raises:
            MalformedRowError: the row lacks a key, holds a wrong type, or the chat template refuses it.
        """
        row = self.rows[index]
        try:
            return self._sample(row)
        except UnusableValueError as error:
            raise MalformedRowError(self.rows.location(index), excerpt(row), str(error)) from error

    def _sample(self, row: Row) -> Sample:
        metadata = _metadata(row, self.format.metadata_key)
        if tools := _tools(row, self.format.tool_key):
            metadata["tools"] = tools
        return Sample(
            prompt=self._prompt(row, tools),
            label=_label(row, self.format.label_key),
            metadata=metadata,
            apply_chat_template_kwargs=dict(self.format.apply_chat_template_kwargs),
        )

    def _prompt(self, row: Row, tools: list[Any] | None) -> str | list[Message]:
        prompt = _required(row, self.format.input_key, "--input-key")
        _check_prompt(prompt, self.format.input_key)
        if not self.format.apply_chat_template:
            return prompt  # type: ignore[no-any-return]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return render(self.tokenizer, messages, tools, self.format.apply_chat_template_kwargs, generation_prompt=True)


class UnusableValueError(Exception):
    """Why a value cannot be used, raised where its place in the file is not known."""


def render(
    tokenizer: Tokenizer,
    messages: list[Message],
    tools: list[Any] | None,
    template_kwargs: dict[str, Any],
    *,
    generation_prompt: bool,
) -> str:
    """The text that the tokenizer's chat template makes of `messages`.

    Raises:
        UnusableValueError: the template refuses them.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=generation_prompt, **template_kwargs
        )
    except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
        raise UnusableValueError(f"the chat template cannot render it ({error}).") from error
    return text


def require_chat_template(tokenizer: Tokenizer) -> None:
    """
    Raises:
        DataError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "chat template",
            tokenizer.chat_template,
            "the tokenizer of --hf-checkpoint has none, and messages cannot become text without it.",
            "Take a chat model's tokenizer, add chat_template.jinja to the folder, or drop --apply-chat-template.",
        )


def _check_prompt(prompt: Any, key: str) -> None:
    if not isinstance(prompt, str | list):
        raise UnusableValueError(f"{key!r} must be a string or a list of messages, it is {_kind(prompt)}.")
    if not prompt:
        raise UnusableValueError(f"{key!r} is empty.")
    for position, message in enumerate(prompt if isinstance(prompt, list) else []):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UnusableValueError(f"{key}[{position}] must be an object with a role, it is {excerpt(message)}.")
        if message.get("content") is None and not message.get("tool_calls"):
            raise UnusableValueError(f"{key}[{position}] has neither content nor tool_calls, it is {excerpt(message)}.")


def _required(row: Row, key: str, option: str) -> Any:
    if key not in row:
        raise UnusableValueError(f"there is no key {key!r} ({option}), the row has {sorted(row)}.")
    return row[key]


def _label(row: Row, key: str | None) -> str | None:
    if key is None:
        return None
    label = _required(row, key, "--label-key")
    if label is None or isinstance(label, str):
        return label
    if isinstance(label, bool) or not isinstance(label, int | float):
        raise UnusableValueError(
            f"label {key!r} must be a string or a number, it is {_kind(label)}; metadata may hold more."
        )
    return str(label)


def _metadata(row: Row, key: str) -> dict[str, Any]:
    metadata = row.get(key)
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise UnusableValueError(f"{key!r} must be an object, it is {_kind(metadata)}.")
    return dict(metadata)


def _tools(row: Row, key: str) -> list[Any] | None:
    tools = row.get(key)
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise UnusableValueError(f"{key!r} is a string that is not JSON ({error}).") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UnusableValueError(f"{key!r} must be a list of objects (or such a list as JSON), it is {_kind(tools)}.")
    return tools


def _kind(value: Any) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return f"{names.get(type(value), type(value).__name__)} ({excerpt(value)})"
