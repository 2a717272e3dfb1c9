"""--rm-type remote_rm: ask a service at --rm-url."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import httpx

from lockstep.types import Sample

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 8.0
_WORTH_RETRYING = {408, 425, 429}


async def reward(args: Any, sample: Sample) -> Any:
    """POST prompt, response and label as JSON; the reply is the reward, a number or an object.

    A service that cannot be reached, is overloaded or answers with a 5xx is asked again, with growing pauses, until
    the reward's deadline. Any other refusal would stay one, and raises at once.
    """
    body = {"prompt": sample.prompt, "response": sample.response, "label": sample.label}
    pause_s, last_failure = _FIRST_PAUSE_S, "it has not answered yet"
    try:
        while True:
            try:
                reply = await _client().post(args.rm_url, json=body)
                if not (reply.is_server_error or reply.status_code in _WORTH_RETRYING):
                    return _value(reply)
                last_failure = f"its last reply was {_quoted(reply)}"
            except httpx.TransportError as error:
                last_failure = f"the last attempt failed with {error!r}"
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    except asyncio.CancelledError:
        raise TimeoutError(f"{args.rm_url} gave no reward: {last_failure}") from None


@functools.cache
def _client() -> httpx.AsyncClient:
    """One for the worker's life, so that connections are kept. The reward's deadline is the only time limit."""
    return httpx.AsyncClient(timeout=None)


def _value(reply: httpx.Response) -> Any:
    if not reply.is_success:
        raise ValueError(f"{reply.url} refused with {_quoted(reply)}")
    try:
        return reply.json()
    except ValueError:
        raise ValueError(f"{reply.url} answered {_quoted(reply)}, which is not JSON") from None


def _quoted(reply: httpx.Response) -> str:
    return f"{reply.status_code} {reply.text[:200]!r}"
