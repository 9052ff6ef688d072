"""One accepted connection: checks who dialled, then reads frames and puts payloads where they belong.

Payload of a message that is waited for is received straight into its buffer; nothing is copied twice. All bytes are
hostile until the handshake is done, and bounded after it.
Invariants: 1. garbage closes this connection and nothing else (tests/integration/test_hostile_frames.py);
2. a payload counts only when its closing byte says VALID.
Not here: what a frame makes happen (peer.py); the sending end (outbound.py).
"""

import array
import os
import secrets
import select
import socket
from typing import Protocol

from elastic_run.collectives import handshake, wire
from elastic_run.collectives.engine import Engine
from elastic_run.collectives.guarded_socket import GuardedSocket
from elastic_run.collectives.handshake import HELLO_BYTES, NONCE_BYTES, PIPE_LANE, PROOF_BYTES, Hello
from elastic_run.collectives.wire import HEADER_BYTES, FrameError, Header, Kind
from elastic_run.runtime.protocol.errors import ElasticError

INPUT_BYTES = 128 << 10  # small frames are read many at a time
INPUT_BYTES_FIRST = 4 << 10  # of a connection that was never busy: most of a large mesh, and who only knocks
READ_BYTES = 4 << 20  # read per turn before other connections get theirs
DRAIN_TURNS = 16  # read at once of a peer that has closed the other direction
DESCRIPTORS_MAX = 64  # passed and not yet claimed by a SEGMENT frame
_DISCARD = memoryview(bytearray(256 << 10))


class Sink(Protocol):
    """Takes the frames of one peer."""

    def place(self, header: Header) -> memoryview | None:
        """Return where DATA's payload goes, exactly `header.length` bytes; None: nowhere, drop it."""

    def placed(self, header: Header, target: memoryview, valid: bool) -> None:
        """The payload is there, or was torn."""

    def frame(self, header: Header, payload: memoryview, descriptor: int | None) -> None:
        """Any other frame; `payload` is valid only during the call; the descriptor is the sink's to close."""

    def inbound_lost(self, inbound: "Inbound", reason: str) -> None: ...


class Greeter(Protocol):
    """Decides who may speak."""

    secret: bytes

    def sink_of(self, inbound: "Inbound", hello: Hello) -> Sink:
        """Return the sink of whoever sent `hello`. Raises ElasticError when it is not welcome."""

    def take_pipe(self, inbound: "Inbound", sock: socket.socket, hello: Hello) -> None:
        """Take a connection that carries no frames. Raises ElasticError when it is not welcome."""

    def greeting_failed(self, inbound: "Inbound", reason: str) -> None: ...


class Inbound(GuardedSocket):
    """One connection from a peer. Engine thread only."""

    def __init__(self, engine: Engine, greeter: Greeter, sock: socket.socket) -> None:
        super().__init__(engine, sock)
        self._greeter = greeter
        self._passes_descriptors = sock.family == socket.AF_UNIX
        self._descriptors: list[int] = []
        self._input = bytearray(INPUT_BYTES_FIRST)
        self._view = memoryview(self._input)
        self._start = self._end = 0
        self._hello = b""
        self._nonce = b""
        self._sink: Sink | None = None
        self._header: Header | None = None
        self._target: memoryview | None = None  # of the DATA frame under way; None: dropped
        self._left = 0  # payload bytes still to come
        self._crowded = False  # the input was filled to its end
        engine.register(sock.fileno(), select.EPOLLIN | select.EPOLLRDHUP, self._on_event)

    def close(self) -> None:
        super().close()
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
        self._target = None

    def forget(self, buffer: memoryview) -> None:
        """Write no more into `buffer`: whoever owned it is gone; the rest of its payload is dropped."""
        if self._target is not None and self._target.obj is buffer.obj:
            self._target = None

    def drain(self) -> None:
        """Read what is there already: the last words of a peer that has gone."""
        for _ in range(DRAIN_TURNS):
            if self._sock is None or not self._read():
                return

    def _on_event(self, _events: int) -> None:
        self._read()

    def _read(self) -> bool:
        """Read for one turn; True: there may be more."""
        budget = READ_BYTES
        try:
            while budget > 0 and self._sock is not None:
                received = self._receive()
                if not received:
                    self._fail("connection closed by the peer")
                    return False
                budget -= received
                self._digest()
            return True
        except BlockingIOError:
            return False
        except OSError as error:
            self._fail(f"connection lost: {os.strerror(error.errno or 0)}")
        except ElasticError as error:
            self._fail(str(error))
        return False

    def _receive(self) -> int:
        assert self._sock is not None
        if self._start == self._end:
            self._start = self._end = 0
            if self._crowded:
                self._grow()
        elif len(self._input) - self._end < HEADER_BYTES + wire.TEXT_BYTES_MAX:
            self._view[: self._end - self._start] = bytes(self._view[self._start : self._end])
            self._start, self._end = 0, self._end - self._start
        if self._left > 0 and self._start == self._end:
            return self._receive_payload()
        if self._passes_descriptors:
            received = self._receive_with_descriptors()
        elif self._sink is None:  # not a byte more than the greeting: what follows may not be for us to read
            awaited = PROOF_BYTES if self._hello else HELLO_BYTES
            received = self._sock.recv_into(self._view[self._end : self._start + awaited])
        else:
            received = self._sock.recv_into(self._view[self._end :])
        self._end += received
        self._crowded = self._end == len(self._input) < INPUT_BYTES
        return received

    def _grow(self) -> None:
        self._crowded = False
        self._input = bytearray(min(INPUT_BYTES, 4 * len(self._input)))
        self._view = memoryview(self._input)

    def _receive_payload(self) -> int:
        """Read the rest of a payload in place, and with it no more than the next header."""
        assert self._sock is not None
        target = self._target
        rest = _DISCARD[: self._left] if target is None else target[len(target) - self._left :]
        if len(rest) < self._left:
            received = self._sock.recv_into(rest)
        elif self._passes_descriptors:
            # What passes descriptors must be read in the one place that collects them.
            received = self._sock.recv_into(rest)
        else:
            received = self._sock.recvmsg_into([rest, self._view[: 1 + HEADER_BYTES]])[0]
            self._end = max(0, received - self._left)
        self._left -= min(received, self._left)
        return received

    def _receive_with_descriptors(self) -> int:
        assert self._sock is not None
        fds = array.array("i")
        space = socket.CMSG_SPACE(8 * fds.itemsize)
        received, ancillary, flags, _ = self._sock.recvmsg_into(
            [self._view[self._end :]], space, socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        self._descriptors.extend(fds)
        if flags & socket.MSG_CTRUNC or len(self._descriptors) > DESCRIPTORS_MAX:
            raise FrameError("more descriptors were passed than announced")
        return received

    def _digest(self) -> None:
        while self._sock is not None:
            if self._sink is None:
                if not self._greet():
                    return
            elif self._header is not None:
                if not self._finish_payload(self._header):
                    return
            elif self._end - self._start < HEADER_BYTES or not self._begin_frame():
                return

    def _begin_frame(self) -> bool:
        """Take one header, and its payload when it is a small one; False: more bytes are needed."""
        assert self._sink is not None
        header = wire.unpack(self._input, self._start)
        if header.kind is Kind.DATA:
            self._start += HEADER_BYTES
            self._target = self._sink.place(header)
            self._header = header
            self._left = header.length
            return True
        stop = self._start + HEADER_BYTES + header.length
        if self._end < stop:
            return False
        payload = self._view[self._start + HEADER_BYTES : stop]
        self._start = stop
        descriptor = None
        if header.kind is Kind.SEGMENT:
            if not self._descriptors:
                raise FrameError("a segment without its descriptor")
            descriptor = self._descriptors.pop(0)
        self._sink.frame(header, payload, descriptor)
        return True

    def _finish_payload(self, header: Header) -> bool:
        """Take what the input buffer holds of the payload, then the closing byte; False: more bytes are needed."""
        assert self._sink is not None
        available = min(self._left, self._end - self._start)
        if available:
            target = self._target
            if target is not None:
                at = header.length - self._left
                target[at : at + available] = self._view[self._start : self._start + available]
            self._start += available
            self._left -= available
        if self._left or self._start == self._end:
            return False
        closing = self._view[self._start : self._start + 1]
        self._start += 1
        if closing not in (wire.VALID, wire.VOID):
            raise FrameError("a payload without its closing byte")
        target, self._target, self._header = self._target, None, None
        if target is not None:
            self._sink.placed(header, target, closing == wire.VALID)
        return True

    def _greet(self) -> bool:
        assert self._sock is not None
        available = self._end - self._start
        if not self._hello:
            if available < HELLO_BYTES:
                return False
            self._hello = bytes(self._view[self._start : self._start + HELLO_BYTES])
            self._start += HELLO_BYTES
            handshake.unpack_hello(self._hello)
            self._nonce = secrets.token_bytes(NONCE_BYTES)
            self._sock.send(handshake.challenge(self._greeter.secret, self._hello, self._nonce))
            return True
        if available < PROOF_BYTES:
            return False
        given = bytes(self._view[self._start : self._start + PROOF_BYTES])
        self._start += PROOF_BYTES
        handshake.check_proof(self._greeter.secret, self._hello, self._nonce, given)
        hello = handshake.unpack_hello(self._hello)
        if hello.lane == PIPE_LANE:
            self._hand_over(hello)
            return False
        self._sink = self._greeter.sink_of(self, hello)
        self._proved()
        return True

    def _hand_over(self, hello: Hello) -> None:
        sock = self._sock
        assert sock is not None
        if self._passes_descriptors:
            raise FrameError("a pipe within a host")
        self._proved()
        self._engine.unregister(sock.fileno())
        self._sock = None
        try:
            self._greeter.take_pipe(self, sock, hello)
        except (ElasticError, OSError):  # it is not welcome, or gone already
            sock.close()
            raise

    def _fail(self, reason: str) -> None:
        sink = self._sink
        self.close()
        if sink is None:
            self._greeter.greeting_failed(self, reason)
        else:
            sink.inbound_lost(self, reason)
