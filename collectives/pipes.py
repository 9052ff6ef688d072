"""Byte streams between two workers for the compiled kernels: one way each, one per group, kept for a view.

A pipe is a connection like the others, dialled and proved as they are, on a lane of its own; it begins with its number.
Members tell each other by message on which of their pipes an operation's bytes will come, so nothing else has to be
said on it. Between operations it is empty; an interrupted operation closes those it used, and the next dials new ones.
So does a new view: whether the last operation was interrupted at the other end is not known at this one.
A pipe that ends is no lost peer: the peer's other connections say whether that is gone.
Invariants (tests/integration/test_piped.py): 1. no byte of an interrupted operation is ever read by another one;
2. a pipe serves one operation at a time.
Not here: what travels on a pipe (pipes.c); when pipes are used (algorithms/piped.py).
"""

import itertools
import os
import secrets
import select
import socket
import struct
from collections.abc import Callable

from elastic_run.collectives.engine import Engine
from elastic_run.collectives.guarded_socket import EngineSocket
from elastic_run.collectives.handshake import NONCE_BYTES, PIPE_LANE, Hello
from elastic_run.collectives.outbound import Item, Outbound
from elastic_run.collectives.pending import Pending
from elastic_run.runtime.protocol.errors import PeerRefused

PIPES_MAX = 32
"""Of one peer, each way. A group that finds none left goes another way."""
_NUMBER = struct.Struct("<Q")
_NUMBERS = itertools.count(secrets.randbits(48) + 1)  # never those of an earlier process with the same name
_END = select.EPOLLRDHUP


class PipeOut:
    """One on which this worker sends. Engine thread only."""

    def __init__(
        self, engine: Engine, dial: Callable[[], socket.socket], source: str, target: str, secret: bytes
    ) -> None:
        self.number = next(_NUMBERS)
        self.users = 0
        self._target = target
        self._opening: list[Pending] = []  # one for each who waits
        self._opened = False
        self.used = False
        """Whether an operation may have sent on it."""
        self.failure: str | None = None
        """Why it cannot be used any more."""
        self.on_failure: list[Callable[[], None]] = []
        """Called when the peer or the system closes it."""
        self._said = False
        hello = Hello(source=source, target=target, lane=PIPE_LANE, nonce=os.urandom(NONCE_BYTES))
        self._outbound = Outbound(engine, self, dial, hello, secret)

    @property
    def fd(self) -> int | None:
        sock = self._outbound.socket
        return sock.fileno() if sock is not None else None

    def opening(self) -> Pending:
        """Return what is done when it can be used, or `failure` says why not."""
        self.used = True
        pending = Pending(self._target)
        self._opening.append(pending)
        if self._opened or self.failure is not None:
            self._tell()
        return pending

    def close(self) -> None:
        self.failure = self.failure or "closed"
        self._outbound.close()

    def abandon(self) -> None:
        self._outbound.abandon()

    def next_item(self, _lane: int) -> Item | None:
        if self._said:
            return None
        self._said = True
        return Item([_NUMBER.pack(self.number)], self._sent)

    def lane_ready(self, _lane: int) -> None:
        """The number goes out by itself."""

    def lane_lost(self, _outbound: Outbound, reason: str) -> None:
        self.failure = reason
        self._tell()
        for tell in list(self.on_failure):
            tell()

    def _sent(self) -> None:
        self._opened = True
        self._tell()

    def _tell(self) -> None:
        for pending in self._opening:
            pending.finish()
        self._opening.clear()


class PipeIn(EngineSocket):
    """One on which a peer sends: its number is read here, the rest by whoever uses it. Engine thread only."""

    def __init__(self, engine: Engine, sock: socket.socket, on_number: "Callable[[PipeIn], None]") -> None:
        super().__init__(engine, sock)
        self.number = 0
        self._read = b""
        self._on_number = on_number
        self.users = 0
        self.ended = False
        """Whether nothing will come but what is there."""
        engine.register(sock.fileno(), select.EPOLLIN | _END, self._on_event)

    @property
    def fd(self) -> int | None:
        return self._sock.fileno() if self._sock is not None else None

    def _on_event(self, events: int) -> None:
        assert self._sock is not None
        if self.number:
            # Its end. What came before it is still to be read by who uses it. Who does not yet never will: the sender
            # has ended well only if it has got something of everybody it sent to.
            self.ended = True
            self._engine.unregister(self._sock.fileno())
            if not self.users:
                self.close()
            return
        try:
            data = self._sock.recv(_NUMBER.size - len(self._read))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._read += data
        if not data:
            self.close()
        elif len(self._read) == _NUMBER.size:
            (self.number,) = _NUMBER.unpack(self._read)
            self._engine.modify(self._sock.fileno(), _END)  # what follows is none of the engine's business
            self._on_number(self)


class Pipes:
    """Those with one peer. Engine thread only."""

    def __init__(self, engine: Engine, worker: str) -> None:
        self._engine = engine
        self._worker = worker
        self._out: dict[int, PipeOut] = {}  # by group, the one used longest ago first
        self._in: list[PipeIn] = []
        self._expected: dict[int, list[Pending]] = {}

    def to(self, group: int, make: Callable[[], PipeOut]) -> PipeOut | None:
        """Return the group's pipe, made if there is none, for one more user; None: too many are in use."""
        pipe = self._out.pop(group, None)
        if pipe is not None and pipe.failure is not None:
            pipe.close()
            pipe = None
        if pipe is None:
            if len(self._out) >= PIPES_MAX:
                idle = next((known for known, other in self._out.items() if not other.users), None)
                if idle is None:
                    return None
                self._out.pop(idle).close()
            pipe = make()
        pipe.users += 1
        self._out[group] = pipe
        return pipe

    def arrival(self, number: int) -> Pending:
        """Return what is done when the peer's pipe of that number is here."""
        pending = Pending(self._worker)
        if self.find(number) is not None:
            pending.finish()
        else:
            self._expected.setdefault(number, []).append(pending)
        return pending

    def forget(self, number: int, pending: Pending) -> None:
        """Wait for that pipe no longer."""
        waiting = self._expected.get(number, [])
        if pending in waiting:
            waiting.remove(pending)
            if not waiting:
                del self._expected[number]

    def find(self, number: int) -> PipeIn | None:
        return next((pipe for pipe in self._in if pipe.number == number and pipe.fd is not None), None)

    def attach(self, sock: socket.socket) -> None:
        """Take a connection that the peer has dialled as a pipe. Raises PeerRefused when it has too many."""
        self._in = [pipe for pipe in self._in if pipe.fd is not None]
        if len(self._in) > 2 * PIPES_MAX:  # those that the peer has closed and nobody has read to the end count too
            raise PeerRefused(f"{self._worker} has {len(self._in)} pipes open already")
        self._in.append(PipeIn(self._engine, sock, self._numbered))

    def close_used(self) -> None:
        """A view has ended: of an operation that ended well here the peer may have closed the pipe half-way."""
        for group in [group for group, pipe in self._out.items() if pipe.used]:
            self._out.pop(group).close()

    def close(self, *, keep_arrived: bool = False) -> None:
        """`keep_arrived`: what the peer has sent can still be read."""
        for pipe in self._out.values():
            pipe.close()
        self._out.clear()
        if not keep_arrived:
            for arrived in self._in:
                arrived.close()
            self._in.clear()
            self._expected.clear()

    def abandon(self) -> None:
        """In a forked child."""
        for pipe in self._out.values():
            pipe.abandon()
        for arrived in self._in:
            arrived.abandon()

    def _numbered(self, pipe: PipeIn) -> None:
        for pending in self._expected.pop(pipe.number, ()):
            pending.finish()
