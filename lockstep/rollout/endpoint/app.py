"""The routes. Each reads a request, has every prompt sampled as often as asked, and writes the reply.

/health, /v1/models                          answer at any time
/v1/completions, /v1/chat/completions        OpenAI's, whole or as a stream of events
/generate, /model_info                       SGLang's, for functions that were written for slime
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Coroutine
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lockstep.rollout.endpoint import replies
from lockstep.rollout.endpoint.requests import Ask, RequestError, read_chat, read_completion, read_generate
from lockstep.rollout.endpoint.text import TextStream, whole_text
from lockstep.rollout.engine import Generation

if TYPE_CHECKING:
    from lockstep.rollout.endpoint.server import Endpoint

_MOST_BYTES = 64 * 2**20
"""Of a request's body."""


def make_app(endpoint: Endpoint) -> Starlette:
    handlers = _Handlers(endpoint)
    return Starlette(
        routes=[
            Route("/health", handlers.health),
            Route("/v1/models", handlers.models),
            Route("/v1/completions", handlers.completions, methods=["POST"]),
            Route("/v1/chat/completions", handlers.chat, methods=["POST"]),
            Route("/generate", handlers.generate, methods=["POST"]),
            Route("/model_info", handlers.model_info),
        ],
        exception_handlers={RequestError: _refuse, HTTPException: _refuse_http, Exception: _fail},
    )


class _Handlers:
    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.limits = endpoint.policy.limits
        self.started = int(time.time())

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "weight_version": self.endpoint.policy.version})

    async def models(self, request: Request) -> Response:
        entry = {
            "id": self.limits.model,
            "object": "model",
            "created": self.started,
            "owned_by": "lockstep",
            "max_model_len": self.limits.max_context_len,
            "weight_version": self.endpoint.policy.version,
        }
        return JSONResponse({"object": "list", "data": [entry]})

    async def model_info(self, request: Request) -> Response:
        return JSONResponse({"model_path": self.limits.model, "weight_version": self.endpoint.policy.version})

    async def completions(self, request: Request) -> Response:
        ask = read_completion(await _body(request), self.limits)
        writer = _CompletionWriter(self.endpoint, ask)
        return await self._respond(request, ask, writer)

    async def chat(self, request: Request) -> Response:
        ask = read_chat(await _body(request), self.limits)
        writer = _ChatWriter(self.endpoint, ask)
        return await self._respond(request, ask, writer)

    async def generate(self, request: Request) -> Response:
        body = await _body(request)
        session = request.headers.get("x-smg-routing-key")
        ask = read_generate({"session_id": session, **body} if session else body, self.limits)
        (generation,) = await _unless_gone(request, self._sample_all(ask))
        text = whole_text(self._decode, (), generation.token_ids)
        version = generation.weight_versions[-1] if generation.weight_versions else self.endpoint.policy.version
        with_routes = bool(body.get("return_routed_experts"))
        reply = replies.sglang_reply(text, len(ask.prompts[0]), generation, version, with_routes=with_routes)
        return JSONResponse(reply)

    async def _respond(self, request: Request, ask: Ask, writer: _Writer) -> Response:
        if ask.streams:
            return StreamingResponse(
                writer.events(), media_type="text/event-stream", headers={"cache-control": "no-cache"}
            )
        generations = await _unless_gone(request, self._sample_all(ask))
        return JSONResponse(writer.whole(generations))

    async def _sample_all(self, ask: Ask) -> list[Generation]:
        tasks = [
            asyncio.create_task(
                self.endpoint.sample(prompt, ask.params_of(choice), self.endpoint.stream_of(ask.session))
            )
            for prompt in ask.prompts
            for choice in range(ask.n)
        ]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            await _end(*tasks)

    def _decode(self, token_ids: list[int]) -> str:
        return self.limits.tokenizer.decode(token_ids, skip_special_tokens=True)


class _Writer(ABC):
    """Replies to one request, in the manner of one route."""

    kind = chunk_kind = prefix = ""

    def __init__(self, endpoint: Endpoint, ask: Ask) -> None:
        self.endpoint, self.ask = endpoint, ask
        self.tokenizer = endpoint.policy.limits.tokenizer
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    @abstractmethod
    def choice(self, index: int, text: str, log_probs: dict[str, Any] | None, reason: str) -> dict[str, Any]: ...

    def first_delta(self, index: int) -> dict[str, Any] | None:
        """What a stream says before a choice's first text."""
        return None

    @abstractmethod
    def delta(self, index: int, text: str, log_probs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]: ...

    @abstractmethod
    def log_probs(self, token_ids: list[int], log_probs: list[float]) -> dict[str, Any]: ...

    def whole(self, generations: list[Generation]) -> dict[str, Any]:
        choices = []
        for index, generation in enumerate(generations):
            text = whole_text(self.decode, self.ask.stop, generation.token_ids)
            log_probs = self._log_probs(generation.token_ids, generation.log_probs)
            extra = replies.for_training(generation.token_ids, generation.log_probs, generation.weight_versions)
            prompt = {"prompt_token_ids": self.ask.prompts[index // self.ask.n]}
            choices.append(self.choice(index, text, log_probs, generation.finish_reason) | extra | prompt)
        return self._envelope(self.kind, choices) | {"usage": self._usage(generations)}

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events; when the client goes away, the requests are withdrawn."""
        news: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        asks = [(prompt, choice) for prompt in self.ask.prompts for choice in range(self.ask.n)]
        tasks = [
            asyncio.create_task(self._sample(index, prompt, choice, news))
            for index, (prompt, choice) in enumerate(asks)
        ]
        try:
            async for event in self._events(news, len(tasks)):
                yield f"data: {json.dumps(event)}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            await _end(*tasks)

    async def _events(self, news: asyncio.Queue[tuple[int, Any]], missing: int) -> AsyncIterator[dict[str, Any]]:
        texts = [TextStream(self.decode, self.ask.stop) for _ in range(missing)]
        generations = []
        for index in range(missing):
            if (first := self.first_delta(index)) is not None:
                yield self._envelope(self.chunk_kind, [first])
        while missing:
            index, item = await news.get()
            if isinstance(item, RequestError):
                yield item.body()
                return
            if isinstance(item, Generation):
                missing -= 1
                generations.append(item)
                extra = {
                    "weight_versions": item.weight_versions,
                    "prompt_token_ids": self.ask.prompts[index // self.ask.n],
                }
                last = self.delta(index, texts[index].close(), None, item.finish_reason)
                yield self._envelope(self.chunk_kind, [last | extra])
                continue
            token, log_prob = item
            text = texts[index].push(token)
            extra = {"token_ids": [token], "token_logprobs": [log_prob]}
            delta = self.delta(index, text, self._log_probs([token], [log_prob]), None)
            yield self._envelope(self.chunk_kind, [delta | extra])
        if self.ask.wants_usage:
            yield self._envelope(self.chunk_kind, []) | {"usage": self._usage(generations)}

    async def _sample(self, index: int, prompt: list[int], choice: int, news: asyncio.Queue[tuple[int, Any]]) -> None:
        """Put tokens as they come, or all at the end where the engine cannot say; then the whole, or what failed."""
        loop, endpoint = asyncio.get_running_loop(), self.endpoint

        def on_token(token: int, log_prob: float) -> None:
            loop.call_soon_threadsafe(news.put_nowait, (index, (token, log_prob)))

        stream = endpoint.stream_of(self.ask.session)
        try:
            generation = await endpoint.sample(prompt, self.ask.params_of(choice), stream, on_token)
        except RequestError as error:
            news.put_nowait((index, error))
            return
        if not endpoint.policy.streams:
            for pair in zip(generation.token_ids, generation.log_probs, strict=True):
                news.put_nowait((index, pair))
        news.put_nowait((index, generation))

    def decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def _log_probs(self, token_ids: list[int], log_probs: list[float]) -> dict[str, Any] | None:
        return self.log_probs(token_ids, log_probs) if self.ask.wants_log_probs else None

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.endpoint.policy.limits.model,
            "weight_version": self.endpoint.policy.version,
            "choices": choices,
        }

    def _usage(self, generations: list[Generation]) -> dict[str, Any]:
        return replies.usage(sum(map(len, self.ask.prompts)), generations)


class _CompletionWriter(_Writer):
    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def choice(self, index: int, text: str, log_probs: dict[str, Any] | None, reason: str) -> dict[str, Any]:
        return replies.completion_choice(index, text, log_probs, reason)

    def delta(self, index: int, text: str, log_probs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        return replies.completion_choice(index, text, log_probs, reason)

    def log_probs(self, token_ids: list[int], log_probs: list[float]) -> dict[str, Any]:
        return replies.completion_log_probs(self.tokenizer, token_ids, log_probs)


class _ChatWriter(_Writer):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(self, index: int, text: str, log_probs: dict[str, Any] | None, reason: str) -> dict[str, Any]:
        return replies.chat_choice(index, text, log_probs, reason)

    def first_delta(self, index: int) -> dict[str, Any] | None:
        return replies.chat_delta(index, {"role": "assistant", "content": ""}, None, None)

    def delta(self, index: int, text: str, log_probs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        return replies.chat_delta(index, {"content": text} if text else {}, log_probs, reason)

    def log_probs(self, token_ids: list[int], log_probs: list[float]) -> dict[str, Any]:
        return replies.chat_log_probs(self.tokenizer, token_ids, log_probs)


async def _body(request: Request) -> dict[str, Any]:
    if int(request.headers.get("content-length") or 0) > _MOST_BYTES:
        raise RequestError(f"The request is larger than {_MOST_BYTES} bytes.", status=413)
    try:
        body = json.loads(await request.body())
    except ValueError as error:
        raise RequestError(f"The body is not JSON: {error}.") from error
    if not isinstance(body, dict):
        raise RequestError("The body must be a JSON object.")
    return body


async def _unless_gone(request: Request, work: Coroutine[Any, Any, list[Generation]]) -> list[Generation]:
    """The work's result; it is cancelled when the client goes away first."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_until_gone(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestError("The client has gone away.", status=499)
        return task.result()
    finally:
        await _end(task, gone)


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return JSONResponse(error.body(), error.status)


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}."
    return JSONResponse(RequestError(message, status=error.status_code).body(), error.status_code)


async def _fail(request: Request, error: Exception) -> Response:
    return JSONResponse(RequestError(f"{type(error).__name__}: {error}", status=500).body(), 500)
