"""What the controller and a rank say to each other, through a socket, one pickled message after the other."""

from __future__ import annotations

import pickle
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_LENGTH = struct.Struct("!Q")


@dataclass(frozen=True)
class Start:
    """First message to a rank: what to build. Its answer has the number 0."""

    make: Callable[..., Any]
    """Called with the rank's `Place` and the arguments; what it returns has the methods that calls name."""
    rank: int
    world_size: int
    local_rank: int
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Call:
    """Run a method."""

    number: int
    method: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Poke:
    """Come back from a call that can be interrupted."""


@dataclass(frozen=True)
class Answer:
    number: int
    value: Any


@dataclass(frozen=True)
class Failure:
    """A call that raised. A LockstepError travels as it is, any other as text: its class may not pickle."""

    number: int
    error: Exception | str
    trace: str


@dataclass(frozen=True)
class News:
    """A sign of life during a call, and what it is about; None is nothing more than that."""

    kind: str | None = None
    value: Any = None


class Channel:
    """Sends and receives messages. Nothing here waits for longer than the socket's own timeout."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Any) -> None:
        """Raises OSError when nobody reads any more."""
        self.send_frame(frame(message))

    def send_frame(self, data: bytes) -> None:
        self._socket.sendall(data)

    def receive(self) -> Any:
        """Raises EOFError when the other end is closed."""
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        return pickle.loads(self._exactly(length))

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, count: int) -> bytearray:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            received = self._socket.recv_into(view)
            if received == 0:
                raise EOFError
            view = view[received:]
        return data


def frame(message: Any) -> bytes:
    """A message as bytes, for those that go to several ranks."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(data)) + data
