"""What connections have in common: a socket in the engine, and a limit on the time the handshake takes.

Not here: the dialling end (outbound.py), the accepting end (inbound.py), pipes (pipes.py).
"""

import socket
from abc import ABC, abstractmethod

from elastic_run.collectives.engine import Engine

HANDSHAKE_TIMEOUT_S = 5.0


class EngineSocket:
    """A socket that the engine may watch. Engine thread only."""

    def __init__(self, engine: Engine, sock: socket.socket | None) -> None:
        self._engine = engine
        self._sock = sock

    def close(self) -> None:
        if self._sock is not None:
            self._engine.unregister(self._sock.fileno())
            self._sock.close()
            self._sock = None

    def abandon(self) -> None:
        """In a forked child: close the descriptor; the epoll it is in belongs to the parent."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None


class GuardedSocket(EngineSocket, ABC):
    """One that must prove itself in time."""

    def __init__(self, engine: Engine, sock: socket.socket | None) -> None:
        super().__init__(engine, sock)
        self._timer: int | None = engine.after(HANDSHAKE_TIMEOUT_S, self._too_late)

    def close(self) -> None:
        self._proved()
        super().close()

    def _proved(self) -> None:
        """The handshake is over: no limit any more."""
        if self._timer is not None:
            self._engine.cancel(self._timer)
            self._timer = None

    def _too_late(self) -> None:
        self._timer = None
        self._fail(f"no handshake within {HANDSHAKE_TIMEOUT_S:g} s")

    @abstractmethod
    def _fail(self, reason: str) -> None:
        """Close, and tell whom it concerns."""
