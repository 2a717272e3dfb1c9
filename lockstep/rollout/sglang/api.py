"""SGLang's HTTP protocol for what is not sampling: health, pauses, weights. Blocking calls, each with a deadline."""

from __future__ import annotations

import atexit
import json
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import httpx

from lockstep.errors import RolloutError

CONTROL_S = 120.0
"""What a server gets for an answer when nothing says otherwise."""
READ_S = 30.0
"""What it gets to say how it is."""
_POLL_S = 0.05
_JSON = {"content-type": "application/json"}
_KEPT_S = 1.0
"""A connection without requests is kept for so long. A server closes one that a request is just sent on after 5 s."""


class ServerApi:
    """One server by its address.

    Args:
        number: its place among the servers of a run, which says what GPUs it has.
    """

    def __init__(self, url: str, number: int = 0) -> None:
        self.url = url
        self.number = number

    def post(
        self, path: str, body: dict[str, Any] | bytes | None = None, *, timeout_s: float = CONTROL_S
    ) -> dict[str, Any]:
        """The server's JSON answer; {} for one that is text.

        Args:
            body: an object for JSON, or the JSON itself.
        Raises:
            RolloutError: no answer in time, or a refusal, with the server's own words.
        """
        try:
            content = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
            response = _client().post(self.url + path, content=content, headers=_JSON, timeout=timeout_s)
            is_json = "json" in response.headers.get("content-type", "")
            answer = response.json() if is_json and response.content else {}
        except (httpx.HTTPError, ValueError) as error:
            raise self.error(path, f"it gave no answer ({type(error).__name__}: {error}).") from error
        if response.status_code != 200 or (isinstance(answer, dict) and answer.get("success") is False):
            raise self.error(path, f"it answered {response.status_code}: {response.text[:500]}")
        return answer if isinstance(answer, dict) else {}

    def get(self, path: str, *, timeout_s: float = READ_S) -> dict[str, Any]:
        """As `post`, of what can be read."""
        try:
            response = _client().get(self.url + path, timeout=timeout_s)
            response.raise_for_status()
            answer: dict[str, Any] = response.json() if response.content else {}
        except (httpx.HTTPError, ValueError) as error:
            raise self.error(path, f"it gave no answer ({type(error).__name__}: {error}).") from error
        return answer

    def is_healthy(self, timeout_s: float) -> bool:
        """Whether it generates."""
        try:
            return _client().get(f"{self.url}/health_generate", timeout=timeout_s).status_code == 200
        except httpx.HTTPError:
            return False

    def is_responsive(self, timeout_s: float) -> bool:
        """Whether its scheduler answers; a paused server's does, which generates nothing."""
        try:
            self.num_requests(timeout_s=timeout_s)
        except RolloutError:
            return False
        return True

    def num_requests(self, *, timeout_s: float = READ_S) -> int:
        """Requests that it computes or keeps waiting."""
        path = "/v1/loads?include=core"
        try:
            loads = self.get(path, timeout_s=timeout_s)["loads"]
            return sum(int(load["num_running_reqs"]) + int(load["num_waiting_reqs"]) for load in loads)
        except (KeyError, TypeError, ValueError) as error:
            raise self.error(path, f"it did not say what it computes ({type(error).__name__}: {error}).") from error

    def wait_until_idle(self, timeout_s: float) -> None:
        """Return when it computes nothing.

        Raises:
            RolloutError: it still does after that time, or gives no answer.
        """
        deadline = time.monotonic() + timeout_s
        while (busy := self.num_requests()) > 0:
            if time.monotonic() > deadline:
                raise self.error("/v1/loads", f"it still computes {busy} requests after {timeout_s:g} s.")
            time.sleep(_POLL_S)

    def release_memory(self, tags: Sequence[str]) -> None:
        """Give this memory of the GPU back until `resume_memory`. It has to be idle."""
        self.post("/release_memory_occupation", {"tags": list(tags)})

    def resume_memory(self, tags: Sequence[str]) -> None:
        """Take it again; what the memory held is lost."""
        self.post("/resume_memory_occupation", {"tags": list(tags)})

    def pause(self, timeout_s: float = CONTROL_S) -> None:
        """End what is under way and forget what is cached; nothing is admitted until `resume`."""
        self.post("/pause_generation", {"mode": "abort"}, timeout_s=timeout_s)
        self.flush_cache()

    def flush_cache(self) -> None:
        self.post(f"/flush_cache?timeout={CONTROL_S / 2:g}")

    def resume(self) -> None:
        self.post("/continue_generation")

    def weight_version(self) -> str:
        return str(self.get("/model_info").get("weight_version"))

    def error(self, path: str, reason: str) -> RolloutError:
        return RolloutError(
            f"SGLang server {self.url}{path}", "no success", reason, "Look at the server's log, which says why."
        )


@cache
def _client() -> httpx.Client:
    """One for all servers and threads: to read certificates and to connect takes longer than most answers."""
    client = httpx.Client(limits=httpx.Limits(max_connections=None, keepalive_expiry=_KEPT_S))
    atexit.register(client.close)
    return client
