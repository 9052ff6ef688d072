"""One connection on which this worker sends: dials, proves itself, then writes frames as the socket takes them.

It never reads frames: what the peer has to say comes on the peer's own connection. Bytes or an end here mean that the
peer is gone.
Not here: what is sent, and in which order (peer.py); the receiving end (inbound.py).
"""

import array
import contextlib
import os
import select
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from elastic_run.collectives import handshake
from elastic_run.collectives.engine import Engine
from elastic_run.collectives.guarded_socket import GuardedSocket
from elastic_run.collectives.handshake import CHALLENGE_BYTES, Hello
from elastic_run.collectives.wire import VOID, FrameError

if TYPE_CHECKING:
    from elastic_run.collectives.arena import Region

SEND_BUFFERS = 48  # of one sendmsg; IOV_MAX is 1024
PUMP_BYTES = 4 << 20  # written per turn before other connections get theirs
_READ = select.EPOLLIN | select.EPOLLRDHUP
_WRITE = _READ | select.EPOLLOUT


class Item:
    """Buffers that leave together, in order. `buffers[-1]` of a DATA item is its closing byte."""

    __slots__ = ("buffers", "descriptors", "on_sent", "owner", "region")

    def __init__(
        self,
        buffers: "list[bytes | memoryview]",
        on_sent: Callable[[], None] | None = None,
        descriptors: tuple[int, ...] = (),
        owner: object = None,
        region: "Region | None" = None,
    ) -> None:
        self.buffers = buffers
        self.on_sent = on_sent
        self.descriptors = descriptors
        self.owner = owner
        """The message it is part of."""
        self.region = region
        """What the receiver holds once it was told."""


class Source(Protocol):
    """Where a connection gets what it sends, and whom it tells about itself."""

    def next_item(self, lane: int) -> Item | None: ...

    def lane_ready(self, lane: int) -> None: ...

    def lane_lost(self, outbound: "Outbound", reason: str) -> None: ...


class Outbound(GuardedSocket):
    """One lane to a peer. Engine thread only."""

    def __init__(
        self, engine: Engine, source: Source, dial: Callable[[], socket.socket], hello: Hello, secret: bytes
    ) -> None:
        super().__init__(engine, None)
        self._source = source
        self._hello = handshake.pack_hello(hello)
        self._secret = secret
        self.lane = hello.lane
        self._answer = b""
        self._item: Item | None = None
        self._last: Item | None = None  # what is said at the end
        self._ending = False  # nothing is sent any more but the rest of `_last`
        self._writing = True
        self.ready = False
        self.blocked_since_ns = 0
        self.blocked_ns = 0
        """Time in which there was something to send and the socket took nothing."""
        try:
            self._sock = dial()
            engine.register(self._sock.fileno(), _WRITE, self._on_connect)
        except OSError as error:
            self._fail_soon(f"cannot connect: {os.strerror(error.errno or 0)}")

    @property
    def socket(self) -> socket.socket | None:
        return self._sock

    def close(self) -> None:
        super().close()
        self.ready = False
        self._item = None

    def void(self, owner: object) -> None:
        """Have the receiver drop what is half sent of `owner`: its bytes may change from now on."""
        if self._item is not None and self._item.owner is owner:
            self._item.buffers[-1] = VOID

    def withdraw(self, item: Item) -> None:
        """Do not send an item of which nothing was sent yet."""
        if self._item is item:
            self._item = None

    def finish(self, last: bytes) -> None:
        """After everything that waits, send `last`, then end this direction: the peer answers by closing."""
        if not self._ending and self._last is None:
            self._last = Item([last])
            self.pump()

    def _next_item(self) -> Item | None:
        if self._ending:
            return None
        item = self._source.next_item(self.lane)
        if item is None and self._last is not None:
            item, self._last, self._ending = self._last, None, True
        return item

    def pump(self) -> None:
        """Write until there is nothing to write or the socket is full."""
        if not self.ready or self._sock is None:
            return
        budget = PUMP_BYTES
        try:
            while budget > 0:
                if self._item is None:
                    self._item = self._next_item()
                    if self._item is None:
                        break
                sent = self._send(self._item)
                budget -= sent
        except BlockingIOError:
            if not self.blocked_since_ns:
                self.blocked_since_ns = time.monotonic_ns()
            self._want_write(True)
            return
        except OSError as error:
            self._fail_soon(f"connection lost: {os.strerror(error.errno or 0)}")
            return
        if self.blocked_since_ns:
            self.blocked_ns += time.monotonic_ns() - self.blocked_since_ns
            self.blocked_since_ns = 0
        self._want_write(budget <= 0)  # there may be more: others first

    def _send(self, item: Item) -> int:
        assert self._sock is not None
        buffers = item.buffers
        if item.descriptors:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _ints(item.descriptors))]
            sent = self._sock.sendmsg(buffers, rights)
            item.descriptors = ()
        else:
            sent = self._sock.sendmsg(buffers if len(buffers) <= SEND_BUFFERS else buffers[:SEND_BUFFERS])
        left = sent
        position = 0
        while position < len(buffers) and left >= len(buffers[position]):
            left -= len(buffers[position])
            position += 1
        del buffers[:position]
        if buffers:
            if left:
                buffers[0] = memoryview(buffers[0])[left:]
        else:
            self._item = None
            if item.on_sent is not None:
                item.on_sent()
            if self._ending:
                self._sock.shutdown(socket.SHUT_WR)
        return sent

    def _want_write(self, writing: bool) -> None:
        if writing != self._writing and self._sock is not None:
            self._writing = writing
            self._engine.modify(self._sock.fileno(), _WRITE if writing else _READ)

    def _on_connect(self, events: int) -> None:
        assert self._sock is not None
        fault = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if fault:
            self._fail(f"cannot connect: {os.strerror(fault)}")
            return
        if not events & select.EPOLLOUT:
            return
        try:
            sent = self._sock.send(self._hello)  # a fresh socket's buffer holds it
        except OSError as error:
            self._fail(f"cannot connect: {os.strerror(error.errno or 0)}")
            return
        if sent != len(self._hello):
            self._fail("cannot connect: the greeting did not fit the socket")
            return
        fd = self._sock.fileno()
        self._engine.unregister(fd)
        self._engine.register(fd, _READ, self._on_answer)
        self._writing = False

    def _on_answer(self, _events: int) -> None:
        assert self._sock is not None
        try:
            data = self._sock.recv(CHALLENGE_BYTES - len(self._answer))
            if not data:
                self._fail("the peer refused the connection")
                return
            self._answer += data
            if len(self._answer) < CHALLENGE_BYTES:
                return
            self._sock.send(handshake.proof(self._secret, self._hello, self._answer))
        except BlockingIOError:
            return
        except (OSError, FrameError) as error:
            self._fail(f"handshake failed: {error}")
            return
        self._proved()
        fd = self._sock.fileno()
        self._engine.unregister(fd)
        self._engine.register(fd, _READ, self._on_event)
        self.ready = True
        self._source.lane_ready(self.lane)
        self.pump()

    def _on_event(self, events: int) -> None:
        if events & ~select.EPOLLOUT:
            self._fail(self._end_reason())
        else:
            self.pump()

    def _end_reason(self) -> str:
        assert self._sock is not None
        with contextlib.suppress(BlockingIOError):
            try:
                if self._sock.recv(1):
                    return "the peer wrote where it only reads"
            except OSError as error:
                return f"connection lost: {os.strerror(error.errno or 0)}"
        return "connection closed by the peer"

    def _fail(self, reason: str) -> None:
        self.close()
        self._source.lane_lost(self, reason)

    def _fail_soon(self, reason: str) -> None:
        """Fail outside of whatever is sending now."""
        self.close()
        self._engine.soon(lambda: self._source.lane_lost(self, reason))


def _ints(values: tuple[int, ...]) -> bytes:
    return array.array("i", values).tobytes()


def round_trip_s(sock: socket.socket) -> float:
    """Return the kernel's smoothed round-trip time of a TCP connection; 0 when it does not tell."""
    try:
        raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    except OSError:
        return 0.0
    return float(int.from_bytes(raw[68:72], "little")) / 1e6 if len(raw) >= 72 else 0.0
