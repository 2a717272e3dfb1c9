"""SGLang's servers as a rollout engine.

A request's life: `generate` picks a server, `_ask` posts to it straight, `read_generation` checks what comes back. A
server that dies, hangs or answers garbage is lost: its requests go to others, or wait until `Fleet` has it back with
the current weights. A request is answered once, by whichever server answered it whole.

New weights may come while requests are under way (`set_version`): they are finished first, handed back with what they
have, or go on under the new weights, where each token keeps the version, log-prob and experts it was sampled with.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Protocol

import httpx

from lockstep.errors import RolloutError
from lockstep.rollout.continuation import joined, remaining
from lockstep.rollout.engine import Generation, SamplingParams
from lockstep.rollout.sglang.api import CONTROL_S, ServerApi
from lockstep.rollout.sglang.protocol import GarbageAnswer, generate_payload, read_generation, sampling_seed

logger = logging.getLogger(__name__)

_MAX_SENDS = 4
"""How often one request is sent before it, not the servers, is what is wrong."""
_POLL_S = 0.2

PauseMode = Literal["finish", "abort", "retract"]
"""What becomes of requests that are under way when new weights come."""


class Server:
    """One server and what it has to do for us. `version` is that of its weights, None while nothing may be sent."""

    def __init__(self, api: ServerApi) -> None:
        self.api = api
        self.version: str | None = None
        self.outstanding_tokens = 0
        self.heard_at = time.monotonic()


class Fleet(Protocol):
    """Who keeps the servers: starts them, ends them and brings weights to them."""

    @property
    def servers(self) -> list[Server]: ...

    def publish(self, version: int) -> None:
        """Give all servers the weights of this version, and no cache."""
        ...

    def release(self) -> None:
        """Until the next `publish` nothing will be asked: servers that share training's GPUs give their memory back."""
        ...

    @property
    def is_at_rest(self) -> bool:
        """False while another thread trains, and `begin_revival` and `admit` have to wait."""
        ...

    def begin_revival(self, server: Server) -> None:
        """Start a lost server again, with the newest weights."""
        ...

    def end(self, server: Server) -> None:
        """Kill a server that is of no use any more; `publish` starts it again.

        Raises:
            RolloutError: it is somebody else's.
        """
        ...

    def is_revived(self, server: Server) -> bool:
        """Whether it works again. It may be asked on another thread.

        Raises:
            RolloutError: it will not come back.
        """
        ...

    def admit(self, server: Server) -> None:
        """See that a server that works again has the newest weights, and set its version."""
        ...

    def is_process_alive(self, server: Server) -> bool:
        """False for a process of ours that has ended. Of other people's servers nobody knows: True."""
        ...

    def close(self) -> None: ...


class SGLangEngine:
    """`RolloutEngine` over HTTP, without a router.

    Samples of one prompt go to one server, where they share its prefix; a new prompt goes to the server with the fewest
    tokens outstanding.

    Args:
        routes_shape: sparse layers and experts per token, where the servers are to say which experts they chose.
        request_timeout_s: after this, the server of an unanswered request counts as lost.
        health_interval_s: how long a server may say nothing before it is asked whether it lives.
        health_timeout_s: how long it may take to say so.
        pause_mode: of requests that are under way when `set_version` is called.
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        seed: int,
        routes_shape: tuple[int, int] | None,
        request_timeout_s: float,
        health_interval_s: float,
        health_timeout_s: float,
        pause_mode: PauseMode = "finish",
    ) -> None:
        self.fleet = fleet
        self.seed = seed
        self.routes_shape = routes_shape
        self.request_timeout_s = request_timeout_s
        self.health_interval_s = health_interval_s
        self.health_timeout_s = health_timeout_s
        self.pause_mode = pause_mode
        self.num_lost = 0
        """Servers lost so far."""
        self.num_resent = 0
        """Requests sent again so far."""
        self._server_of: dict[tuple[int, ...], Server] = {}
        self._posts: dict[Server, set[asyncio.Task[httpx.Response]]] = {server: set() for server in fleet.servers}
        self._under_way = 0
        self._asked: set[str] = set()
        """Ids of the requests that servers have."""
        self._interrupted: set[str] = set()
        """Ids of those that an update has ended, and that go on after it."""
        self._client: httpx.AsyncClient | None = None
        self._watch: asyncio.Task[None] | None = None
        self._revivals: dict[Server, asyncio.Task[None]] = {}
        self._farewells: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count()
        self._name = uuid.uuid4().hex[:12]

    async def generate(self, input_ids: Sequence[int], params: SamplingParams, stream: tuple[int, ...]) -> Generation:
        self._under_way += 1
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._watch_servers())
        try:
            return await self._generate(input_ids, params, stream)
        finally:
            self._under_way -= 1

    async def _generate(self, input_ids: Sequence[int], params: SamplingParams, stream: tuple[int, ...]) -> Generation:
        reasons: list[str] = []
        written: Generation | None = None
        while len(reasons) < _MAX_SENDS:
            server = await self._pick(stream)
            api, tokens = server.api, len(input_ids) + params.max_new_tokens
            server.outstanding_tokens += tokens
            try:
                asked = (input_ids, params) if written is None else remaining(input_ids, params, written)
                part, goes_on = await self._ask(server, *asked, stream)
            except (httpx.HTTPError, GarbageAnswer, _Lost) as error:
                reasons.append(f"{api.url}: {type(error).__name__}: {error}")
                self.num_resent += 1
                if server.api is api:  # else it was started again meanwhile
                    self._lose(server, reasons[-1])
                continue
            finally:
                server.outstanding_tokens -= tokens
            written = part if written is None else joined(written, part)
            if not goes_on:
                return written
            if len(written.token_ids) == params.max_new_tokens:
                return replace(written, finish_reason="length")
        raise RolloutError(
            "SGLang request",
            f"{len(input_ids)} tokens",
            f"it was sent {len(reasons)} times and never answered: {'; '.join(reasons)}.",
            "Look at the servers' logs; raise --rollout-request-timeout if answers take longer.",
        )

    async def _pick(self, stream: tuple[int, ...]) -> Server:
        """The server of the request's group; where that is lost, another, once there is one."""
        group = stream[:3]
        while True:
            server = self._server_of.get(group)
            if server is not None and server.version is not None:
                return server
            if routable := [server for server in self.fleet.servers if server.version is not None]:
                self._server_of[group] = min(routable, key=lambda server: server.outstanding_tokens)
                return self._server_of[group]
            if not self._revivals:
                raise RolloutError(
                    "SGLang servers",
                    ", ".join(server.api.url for server in self.fleet.servers),
                    "none of them works.",
                    "Look at their logs.",
                )
            await asyncio.wait(self._revivals.values(), return_when=asyncio.FIRST_COMPLETED)
            self._raise_failed_revivals()

    async def _ask(
        self, server: Server, input_ids: Sequence[int], params: SamplingParams, stream: tuple[int, ...]
    ) -> tuple[Generation, bool]:
        """What the server has sampled, and whether only new weights have ended it."""
        rid = f"{self._name}-{next(self._numbers)}"
        body = generate_payload(
            input_ids,
            params,
            rid=rid,
            seed=sampling_seed(self.seed, stream),
            routed_experts=self.routes_shape is not None,
        )
        url = f"{server.api.url}/generate"
        post = asyncio.ensure_future(self._http().post(url, json=body, timeout=self.request_timeout_s))
        self._posts[server].add(post)
        self._asked.add(rid)
        try:
            done, _ = await asyncio.wait([post], timeout=self.request_timeout_s)
            if not done or post.cancelled():
                raise _Lost("no answer in time" if not done else "the server was lost")
            response = post.result()
        except asyncio.CancelledError:
            self._farewells.add(asyncio.create_task(self._say(server, "/abort_request", {"rid": rid})))
            raise
        finally:
            self._posts[server].discard(post)
            self._asked.discard(rid)
            was_interrupted = rid in self._interrupted
            self._interrupted.discard(rid)
            post.cancel()
        server.heard_at = time.monotonic()
        if 400 <= response.status_code < 500:
            raise RolloutError(
                "SGLang request",
                f"{len(input_ids)} tokens",
                f"{server.api.url} refused it: {response.text[:500]}",
                "Change what is asked for, or the server's arguments (--sglang-*).",
            )
        if response.status_code != 200:
            raise GarbageAnswer(f"status {response.status_code}: {response.text[:200]}")
        try:
            reply = response.json()
        except ValueError as error:
            raise GarbageAnswer(f"no JSON: {response.text[:200]}") from error
        generation = read_generation(
            reply,
            num_prompt=len(input_ids),
            max_new_tokens=params.max_new_tokens,
            routes_shape=self.routes_shape,
        )
        return generation, was_interrupted and generation.finish_reason == "abort"

    async def abort_all(self) -> None:
        """End every request with what it has: callers get their partial responses."""
        for server in self.fleet.servers:
            if server.version is not None:
                await self._say(server, "/abort_request", {"abort_all": True})

    async def _say(self, server: Server, path: str, body: dict[str, object]) -> None:
        with contextlib.suppress(httpx.HTTPError):
            await self._http().post(server.api.url + path, json=body, timeout=10.0)

    async def drain(self) -> None:
        """Return when the servers compute nothing for us any more, and lost ones are back. They get no more requests
        before the next `set_version`."""
        while self._farewells:
            await asyncio.wait(self._farewells)
            self._farewells = {task for task in self._farewells if not task.done()}
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
            self._watch = None
        for server in self.fleet.servers:
            if server.version is not None:
                await self._wait_until_idle(server)
        if self._revivals:
            await asyncio.wait(self._revivals.values())
            self._raise_failed_revivals()
        if self._client is not None:
            await self._client.aclose()
            self._client = None
        self.fleet.release()

    async def _wait_until_idle(self, server: Server) -> None:
        try:
            await asyncio.to_thread(server.api.wait_until_idle, CONTROL_S)
        except RolloutError as error:
            self._lose(server, str(error))

    def set_version(self, version: int) -> None:
        """As the protocol says; requests may be under way, and `pause_mode` says what becomes of them."""
        if self._asked:
            self._end_requests()
        self._server_of.clear()
        self.fleet.publish(version)

    def _end_requests(self) -> None:
        """Bring the servers to rest. The event loop stands still meanwhile: answers are read when it goes on."""
        if self.pause_mode == "retract":
            self._interrupted |= self._asked
        for server in self.fleet.servers:
            if server.version is None:
                continue
            try:
                if self.pause_mode != "finish":
                    server.api.post("/abort_request", {"abort_all": True}, timeout_s=self.health_timeout_s)
                server.api.wait_until_idle(self.request_timeout_s if self.pause_mode == "finish" else CONTROL_S)
            except RolloutError as error:
                logger.warning("SGLang server lost: %s", error)
                self.num_lost += 1
                self.fleet.end(server)

    def close(self) -> None:
        self.fleet.close()

    async def _watch_servers(self) -> None:
        """Notice dead processes at once, and silent servers by asking them."""
        asked: dict[Server, asyncio.Task[bool]] = {}
        try:
            while self._under_way:
                await asyncio.sleep(_POLL_S)
                for server in self.fleet.servers:
                    if server.version is None:
                        if (stale := asked.pop(server, None)) is not None:
                            stale.cancel()  # what it says of a lost server is not true of the one that comes back
                        continue
                    if not self.fleet.is_process_alive(server):
                        self._lose(server, f"{server.api.url}: its process has ended")
                    elif (task := asked.get(server)) is not None:
                        if task.done():
                            del asked[server]
                            if not task.result():
                                self._lose(server, f"{server.api.url}: it failed its health check")
                            server.heard_at = time.monotonic()
                    elif time.monotonic() - server.heard_at > self.health_interval_s:
                        asked[server] = asyncio.create_task(self._is_healthy(server))
        finally:
            for task in asked.values():
                task.cancel()

    async def _is_healthy(self, server: Server) -> bool:
        try:
            response = await self._http().get(f"{server.api.url}/health_generate", timeout=self.health_timeout_s)
        except httpx.HTTPError:
            return False
        return response.status_code == 200

    def _lose(self, server: Server, reason: str) -> None:
        """Send nothing more to this server, give up on its answers, and get it back."""
        if server.version is None:
            return
        logger.warning("SGLang server lost: %s. Its requests are sent again.", reason)
        self.num_lost += 1
        server.version = None
        for post in list(self._posts[server]):
            post.cancel()
        self._revivals[server] = asyncio.create_task(self._revive(server))

    async def _revive(self, server: Server) -> None:
        await self._until_rest()
        self.fleet.begin_revival(server)
        while not await asyncio.to_thread(self.fleet.is_revived, server):
            await asyncio.sleep(_POLL_S)
        await self._until_rest()
        self.fleet.admit(server)
        server.heard_at = time.monotonic()

    async def _until_rest(self) -> None:
        while not self.fleet.is_at_rest:
            await asyncio.sleep(_POLL_S)

    def _raise_failed_revivals(self) -> None:
        """Forget the revivals that are over.

        Raises:
            RolloutError: a server did not come back.
        """
        for server, task in list(self._revivals.items()):
            if task.done():
                del self._revivals[server]
                task.result()

    def _http(self) -> httpx.AsyncClient:
        if self._client is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
            self._client = httpx.AsyncClient(limits=limits, timeout=self.request_timeout_s)
        return self._client


class _Lost(Exception):
    """The server of a request was lost before it answered."""
