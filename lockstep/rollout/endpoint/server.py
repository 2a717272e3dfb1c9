"""The endpoint: an HTTP server on a thread of its own, which answers while training keeps the main thread busy."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from typing import Any

from lockstep.errors import LockstepError, OptionError
from lockstep.rollout.embedded.engine import EmbeddedEngine
from lockstep.rollout.endpoint.gate import GatedEngine, OnToken
from lockstep.rollout.endpoint.requests import Limits, RequestError
from lockstep.rollout.engine import Generation, SamplingParams

_OUTSIDE = 2
"""First part of the streams of requests from outside; rollouts have 0, evaluation 1, and are served first."""
_CLOSE_S = 5.0


@dataclass(frozen=True)
class ServedPolicy:
    """What the endpoint serves: a policy behind its gate, on the event loop that runs it."""

    engine: GatedEngine
    limits: Limits
    loop: asyncio.AbstractEventLoop

    @property
    def streams(self) -> bool:
        """Whether tokens can be had as they come."""
        return isinstance(self.engine.engine, EmbeddedEngine)

    @property
    def version(self) -> str:
        return str(self.engine.version or 0)


class Endpoint:
    """Serves until it is closed.

    Args:
        listener: of `listen`; it is closed with the endpoint.
    """

    def __init__(self, policy: ServedPolicy, listener: socket.socket) -> None:
        import uvicorn

        from lockstep.rollout.endpoint.app import make_app

        self.policy = policy
        self._sessions: dict[str, int] = {}
        self._numbers = count()
        self._under_way: set[Future[Any]] = set()
        self._listener = listener
        address, self.port = listener.getsockname()[:2]
        self.host = f"[{address}]" if ":" in address else address
        config = uvicorn.Config(
            make_app(self),
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=int(_CLOSE_S),
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="endpoint", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def stream_of(self, session: str | None) -> tuple[int, ...]:
        """The random stream of a request, which is also its place in line; requests of a session share their start."""
        number = next(self._numbers)
        if session is None:
            return (_OUTSIDE, 0, number, 0)
        return (_OUTSIDE, 0, self._sessions.setdefault(session, number), number)

    async def sample(
        self, prompt: list[int], params: SamplingParams, stream: tuple[int, ...], on_token: OnToken | None = None
    ) -> Generation:
        """Ask the policy, from the server's event loop. To cancel it is to withdraw the request.

        Raises:
            RequestError: the engine refuses the request, or has failed.
        """
        future = asyncio.run_coroutine_threadsafe(self._sample(prompt, params, stream, on_token), self.policy.loop)
        self._under_way.add(future)
        try:
            return await asyncio.wrap_future(future)
        except LockstepError as error:
            raise RequestError(str(error), error.field) from error
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise
            raise RequestError("The server is closing.", status=503) from None
        except Exception as error:
            raise RequestError(f"Sampling has failed: {type(error).__name__}: {error}", status=500) from error
        finally:
            self._under_way.discard(future)

    def close(self) -> None:
        """Withdraw what is under way and stop. Call it from another thread than the server's."""
        self._server.should_exit = True
        for future in list(self._under_way):
            future.cancel()
        self._thread.join(2 * _CLOSE_S)
        self._listener.close()

    def _sample(
        self, prompt: list[int], params: SamplingParams, stream: tuple[int, ...], on_token: OnToken | None
    ) -> Coroutine[Any, Any, Generation]:
        return self.policy.engine.generate_from_outside(prompt, params, stream, on_token)

    def _serve(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._listener]))


def listen(host: str, port: int, option: str) -> socket.socket:
    """A socket for an `Endpoint`: what may fail is found out before a model is loaded.

    Args:
        port: 0 takes a free one.
        option: the port's.
    Raises:
        OptionError: the address cannot be had, or the packages that serve are not installed.
    """
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise OptionError(
            option,
            port,
            f"serving needs the package {missing[0]}, which is not installed.",
            "Install what serves: `pip install starlette uvicorn`.",
        )
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(
            option, port, f"it cannot be opened on {host}: {reason}.", "Give another one, or 0 for a free one."
        ) from error
