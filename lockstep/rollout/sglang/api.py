"""SGLang's HTTP protocol for what is not sampling: health, pauses, weights. Blocking calls, each with a deadline."""

from __future__ import annotations

from typing import Any

import httpx

from lockstep.errors import RolloutError

CONTROL_S = 120.0
"""What a server gets for an answer when nothing says otherwise."""


class ServerApi:
    """One server by its address."""

    def __init__(self, url: str) -> None:
        self.url = url

    def post(self, path: str, body: dict[str, Any] | None = None, *, timeout_s: float = CONTROL_S) -> dict[str, Any]:
        """The server's JSON answer; {} for one that is text.

        Raises:
            RolloutError: no answer in time, or a refusal, with the server's own words.
        """
        try:
            response = httpx.post(self.url + path, json=body or {}, timeout=timeout_s)
            is_json = "json" in response.headers.get("content-type", "")
            answer = response.json() if is_json and response.content else {}
        except (httpx.HTTPError, ValueError) as error:
            raise self.error(path, f"it gave no answer ({type(error).__name__}: {error}).") from error
        if response.status_code != 200 or (isinstance(answer, dict) and answer.get("success") is False):
            raise self.error(path, f"it answered {response.status_code}: {response.text[:500]}")
        return answer if isinstance(answer, dict) else {}

    def get(self, path: str, *, timeout_s: float = 10.0) -> dict[str, Any]:
        """As `post`, of what can be read."""
        try:
            response = httpx.get(self.url + path, timeout=timeout_s)
            response.raise_for_status()
            answer: dict[str, Any] = response.json() if response.content else {}
        except (httpx.HTTPError, ValueError) as error:
            raise self.error(path, f"it gave no answer ({type(error).__name__}: {error}).") from error
        return answer

    def is_healthy(self, timeout_s: float) -> bool:
        """Whether it generates."""
        try:
            return httpx.get(f"{self.url}/health_generate", timeout=timeout_s).status_code == 200
        except httpx.HTTPError:
            return False

    def pause(self) -> None:
        """End what is under way and forget what is cached; nothing is admitted until `resume`."""
        self.post("/pause_generation", {"mode": "abort"})
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
