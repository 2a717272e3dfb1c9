"""What a request says: OpenAI's and SGLang's fields, checked, as what the engine understands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lockstep.data.prompts import UnusableValueError, render
from lockstep.data.tokenizer import Tokenizer
from lockstep.errors import RolloutError
from lockstep.rollout.engine import SamplingParams

SGLANG_TOKENS = 128
"""SGLang's default of `max_new_tokens`."""
COMPLETION_TOKENS = 16
"""OpenAI's default of `max_tokens` for completions. Chats may fill the context."""
MOST_CHOICES = 128

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "auto", "none"),
    "top_logprobs": (None, 0),
}
"""Fields that change nothing, and the values that they may have. Other values ask for what is not there."""
_SAMPLING = {
    "ignore_eos", "logprobs", "max_completion_tokens", "max_tokens", "min_tokens", "model", "n", "seed", "session_id",
    "stop", "stop_token_ids", "stream", "stream_options", "temperature", "top_k", "top_p", "user",
}  # fmt: skip
COMPLETION_FIELDS = _SAMPLING | _NEUTRAL.keys() | {"prompt"}
CHAT_FIELDS = _SAMPLING | _NEUTRAL.keys() | {"messages", "tools", "chat_template_kwargs"}


class RequestError(ValueError):
    """A request that cannot be served, in the terms of OpenAI's errors.

    Args:
        message: what is wrong, and what to do instead.
        param: the field.
    """

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Ask:
    """Prompts, each to be answered `n` times."""

    prompts: list[list[int]]
    params: SamplingParams
    n: int
    stop: tuple[str, ...]
    wants_log_probs: bool
    streams: bool
    wants_usage: bool
    session: str | None

    def params_of(self, choice: int) -> SamplingParams:
        """With a seed, choices would be equal if they did not follow different ones."""
        seed = self.params.sampling_seed
        return self.params if seed is None else replace(self.params, sampling_seed=seed + choice)


@dataclass(frozen=True)
class Limits:
    """What requests fall back to and may not exceed."""

    model: str
    tokenizer: Tokenizer
    defaults: Mapping[str, Any]
    """temperature, top_p and top_k of a request that says nothing of them."""
    stop_token_ids: tuple[int, ...]
    """The model's own ends of sequence."""
    max_context_len: int
    vocab_size: int
    chat_template_kwargs: Mapping[str, Any]


def read_completion(body: Mapping[str, Any], limits: Limits) -> Ask:
    """
    Raises:
        RequestError: a field is unknown, missing or impossible.
    """
    _check_fields(body, COMPLETION_FIELDS, limits)
    if body.get("logprobs") not in (None, 0):
        raise RequestError(
            "logprobs counts other likely tokens, which are not kept: use 0, or leave it out.", "logprobs"
        )
    prompts = _prompts(body.get("prompt"), limits)
    return _ask(body, prompts, limits, default_tokens=COMPLETION_TOKENS, wants_log_probs=body.get("logprobs") == 0)


def read_chat(body: Mapping[str, Any], limits: Limits) -> Ask:
    """
    Raises:
        RequestError: a field is unknown, missing or impossible, or the chat template refuses the messages.
    """
    _check_fields(body, CHAT_FIELDS, limits)
    tools, extra = body.get("tools") or None, body.get("chat_template_kwargs") or {}
    if not isinstance(extra, Mapping):
        raise RequestError("chat_template_kwargs must be an object.", "chat_template_kwargs")
    if not limits.tokenizer.chat_template:
        raise RequestError("The model's tokenizer has no chat template: use /v1/completions.", "messages")
    try:
        text = render(
            limits.tokenizer,
            _messages(body.get("messages")),
            tools,
            {**limits.chat_template_kwargs, **extra},
            generation_prompt=True,
        )
    except UnusableValueError as error:
        raise RequestError(str(error), "messages") from error
    prompt = limits.tokenizer.encode(text, add_special_tokens=False)
    wants_log_probs = _flag(body, "logprobs")
    return _ask(body, [prompt], limits, default_tokens=None, wants_log_probs=wants_log_probs)


def read_generate(body: Mapping[str, Any], limits: Limits) -> Ask:
    """SGLang's /generate, as far as slime's functions use it.

    Raises:
        RequestError: a field is missing or impossible.
    """
    if "input_ids" in body:
        prompts = _prompts(body["input_ids"], limits, "input_ids")
    else:
        prompts = _prompts(body.get("text"), limits, "text")
    if len(prompts) != 1:
        raise RequestError("One prompt at a time.", "input_ids" if "input_ids" in body else "text")
    if _flag(body, "stream"):
        raise RequestError("This route does not stream: use /v1/completions.", "stream")
    given = body.get("sampling_params") or {}
    if not isinstance(given, Mapping):
        raise RequestError("sampling_params must be an object.", "sampling_params")
    values = {**limits.defaults, "max_new_tokens": SGLANG_TOKENS, **given}
    if values.pop("n", 1) != 1:
        raise RequestError("One response at a time.", "sampling_params.n")
    for name in ("max_new_tokens", "min_new_tokens", "top_k", "sampling_seed"):
        if values.get(name) is not None:
            values[name] = _whole(values[name], name, least=-(2**63))
    for name in ("temperature", "top_p"):
        values[name] = _number(values, name, limits, 0.0, 1000.0)
    try:
        params = SamplingParams.from_dict(values)
    except RolloutError as error:
        raise RequestError(str(error), error.field) from error
    session = body.get("session_id")
    return _finished(prompts, params, limits, n=1, session=session, ends=True)


def _ask(
    body: Mapping[str, Any],
    prompts: list[list[int]],
    limits: Limits,
    *,
    default_tokens: int | None,
    wants_log_probs: bool,
) -> Ask:
    name = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    most = body.get(name)
    if most is None:
        most = default_tokens or limits.max_context_len
    stop = body.get("stop") or ()
    stop = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, Sequence) or not all(isinstance(text, str) and text for text in stop):
        raise RequestError("stop must be a text or a list of texts, none of them empty.", "stop")
    ids = body.get("stop_token_ids") or ()
    if not isinstance(ids, list | tuple) or not all(_is_token(id_, limits) for id_ in ids):
        raise RequestError("stop_token_ids must be a list of ids of tokens.", "stop_token_ids")
    options = body.get("stream_options") or {}
    params = SamplingParams(
        max_new_tokens=_whole(most, name, least=1),
        temperature=_number(body, "temperature", limits, 0.0, 1000.0),
        top_p=_number(body, "top_p", limits, 0.0, 1.0),
        top_k=_whole(_or_default(body, "top_k", limits), "top_k", least=-1),
        stop=tuple(stop),
        stop_token_ids=tuple(ids),
        min_new_tokens=_whole(body.get("min_tokens") or 0, "min_tokens", least=0),
        sampling_seed=None if body.get("seed") is None else _whole(body["seed"], "seed", least=-(2**63)),
    )
    return _finished(
        prompts,
        params,
        limits,
        n=_whole(body.get("n") or 1, "n", least=1, most=MOST_CHOICES),
        session=body.get("session_id") or body.get("user"),
        ends=not _flag(body, "ignore_eos"),
        wants_log_probs=wants_log_probs,
        streams=_flag(body, "stream"),
        wants_usage=isinstance(options, Mapping) and bool(options.get("include_usage")),
    )


def _finished(
    prompts: list[list[int]],
    params: SamplingParams,
    limits: Limits,
    *,
    n: int,
    session: Any,
    ends: bool,
    wants_log_probs: bool = True,
    streams: bool = False,
    wants_usage: bool = False,
) -> Ask:
    if params.max_new_tokens < 1:
        raise RequestError("max_new_tokens must be 1 or more.", "max_new_tokens")
    if not 0 < params.top_p <= 1:
        raise RequestError("top_p must be above 0 and at most 1.", "top_p")
    if params.top_k == 0 or params.top_k < -1:
        raise RequestError("top_k must be 1 or more, or -1 for all tokens.", "top_k")
    if session is not None and not isinstance(session, str):
        raise RequestError("A session is named by a text.", "session_id")
    room = limits.max_context_len - max(map(len, prompts))
    if room < 1:
        longest = max(map(len, prompts))
        raise RequestError(
            f"The prompt has {longest} tokens, and the context holds {limits.max_context_len} with the response.",
            "messages",
            code="context_length_exceeded",
        )
    vocabulary_ends = limits.stop_token_ids if ends else ()
    params = replace(params, stop_token_ids=(*params.stop_token_ids, *vocabulary_ends)).with_room(room)
    return Ask(prompts, params, n, params.stop, wants_log_probs, streams, wants_usage, session)


def _check_fields(body: Mapping[str, Any], known: set[str], limits: Limits) -> None:
    for name, value in body.items():
        if name not in known:
            raise RequestError(f"{name} is not known here. Known are {', '.join(sorted(known))}.", name)
        if name in _NEUTRAL and value not in _NEUTRAL[name]:
            raise RequestError(f"{name} {value!r} is not there: leave it out.", name)
    if (model := body.get("model", limits.model)) != limits.model:
        raise RequestError(
            f"The model {model!r} does not exist; this is {limits.model!r}.",
            "model",
            status=404,
            code="model_not_found",
        )


def _prompts(prompt: Any, limits: Limits, name: str = "prompt") -> list[list[int]]:
    """A text, texts, token ids, or lists of token ids."""
    if isinstance(prompt, str):
        prompt = [prompt]
    if isinstance(prompt, list) and prompt and all(_is_int(token) for token in prompt):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise RequestError(f"{name} must be a text, token ids, or a list of these.", name)
    found = []
    for entry in prompt:
        if isinstance(entry, str):
            entry = limits.tokenizer.encode(entry, add_special_tokens=False)
        if not isinstance(entry, list) or not all(_is_token(id_, limits) for id_ in entry):
            raise RequestError(f"{name} holds something that is neither text nor ids of tokens.", name)
        if not entry:
            raise RequestError(f"{name} is empty: there is no token to continue.", name)
        found.append(entry)
    return found


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list of at least one message.", "messages")
    read = []
    for position, message in enumerate(messages):
        where = f"messages[{position}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(f"{where} must be an object with a role.", where)
        content = message.get("content")
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            if not all(isinstance(part, str) for part in parts):
                raise RequestError(f"{where} holds a part that is not text; the model reads text only.", where)
            content = "".join(str(part) for part in parts)
        if content is not None and not isinstance(content, str):
            raise RequestError(f"{where}.content must be a text.", where)
        if content is None and not message.get("tool_calls"):
            raise RequestError(f"{where} has neither content nor tool_calls.", where)
        read.append(message | {"content": content or ""})
    return read


def _or_default(body: Mapping[str, Any], name: str, limits: Limits) -> Any:
    value = body.get(name)
    return limits.defaults[name] if value is None else value


def _number(body: Mapping[str, Any], name: str, limits: Limits, least: float, most: float) -> float:
    value = _or_default(body, name, limits)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise RequestError(f"{name} must be a number from {least:g} to {most:g}.", name)
    return float(value)


def _whole(value: Any, name: str, *, least: int, most: int = 2**63 - 1) -> int:
    if not _is_int(value) or not least <= value <= most:
        limit = f"from {least} to {most}" if most < 2**63 - 1 else f"of at least {least}"
        raise RequestError(f"{name} must be a whole number {limit}.", name)
    return int(value)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false.", name)
    return bool(value)


def _is_token(value: Any, limits: Limits) -> bool:
    return _is_int(value) and 0 <= value < limits.vocab_size


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
