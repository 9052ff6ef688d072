"""Speaks the data plane's protocol by hand, with the job's secret or without, and sends whatever a test wants."""

import array
import contextlib
import os
import secrets
import socket
import time
import zlib
from collections.abc import Iterable, Sequence

from elastic_run.collectives import handshake, wire
from elastic_run.collectives.endpoint import Endpoint, this_host
from elastic_run.collectives.handshake import Hello
from elastic_run.collectives.wire import Header, Kind, RegionRef

WAIT_S = 30.0
WORLD = zlib.crc32(b"world")

Shot = tuple[bytes, tuple[int, ...]]
"""Bytes, and descriptors that go with them."""


def connect(endpoint: Endpoint, *, unix: bool) -> socket.socket:
    if unix:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        target: object = b"\0" + endpoint.unix.encode()
    else:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        target = (endpoint.address, endpoint.port)
    sock.settimeout(WAIT_S)
    try:
        sock.connect(target)
    except OSError:
        sock.close()
        raise
    return sock


def greeting(me: str, target: str, lane: int = 0) -> bytes:
    return handshake.pack_hello(Hello(source=me, target=target, lane=lane, nonce=secrets.token_bytes(32)))


def prove(sock: socket.socket, hello: bytes, secret: bytes) -> None:
    """Do what an honest dialler does."""
    sock.sendall(hello)
    sock.sendall(handshake.proof(secret, hello, read(sock, handshake.CHALLENGE_BYTES)))


def dial(endpoint: Endpoint, secret: bytes, me: str = "evil", *, unix: bool = False, lane: int = 0) -> socket.socket:
    """Return a connection that the other side takes for worker `me`'s."""
    sock = connect(endpoint, unix=unix)
    try:
        prove(sock, greeting(me, endpoint.worker, lane), secret)
    except BaseException:
        sock.close()
        raise
    return sock


def read(sock: socket.socket, count: int) -> bytes:
    """Return exactly `count` bytes. Raises EOFError when the other side closes before."""
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def shoot(sock: socket.socket, shots: Iterable[Shot]) -> int:
    """Send them until the other side closes; return how many went out."""
    sent = 0
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for data, descriptors in shots:
            if descriptors and sock.family == socket.AF_UNIX:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors).tobytes())]
                done = sock.sendmsg([data], rights)
                sock.sendall(data[done:])
            else:
                sock.sendall(data)
            sent += 1
    return sent


def finish(sock: socket.socket) -> None:
    """Say that nothing more will come."""
    with contextlib.suppress(OSError):  # the other side has closed already
        sock.shutdown(socket.SHUT_WR)


def closed(sock: socket.socket) -> bool:
    """Say whether the other side closes, after whatever it still says."""
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def frame(header: Header, payload: bytes = b"", closing: bytes = b"") -> bytes:
    return wire.pack(header) + payload + closing


def data_frame(header: Header, payload: bytes) -> bytes:
    return wire.pack(header) + payload + wire.VALID


def region_frame(kind: Kind, region: RegionRef, **fields: int) -> bytes:
    return frame(Header(kind, length=wire.REGION_BYTES, **fields), wire.pack_region(region))


class HostileMember:
    """A member of views whose every byte the test decides. Use as a context."""

    def __init__(self, secret: bytes, worker: str = "evil", *, local: bool = True) -> None:
        self._secret = secret
        self._out: list[socket.socket] = []
        self._in: dict[str, socket.socket] = {}
        name = f"hostile-{os.getpid()}-{secrets.token_hex(4)}"
        self._unix = local
        if local:
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.bind(b"\0" + name.encode())
        else:
            self._listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            self._listener.bind(("127.0.0.1", 0))
        self._listener.settimeout(WAIT_S)
        self._listener.listen()
        port = 1 if local else self._listener.getsockname()[1]
        host = this_host() if local else "another host"
        self.endpoint = Endpoint(worker=worker, host=host, address="127.0.0.1", port=port, unix=name)

    def __enter__(self) -> "HostileMember":
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        self._listener.close()

    def hang_up(self) -> None:
        for sock in (*self._out, *self._in.values()):
            sock.close()
        self._out.clear()
        self._in.clear()

    def join(self, endpoints: Sequence[Endpoint], view: int) -> list[socket.socket]:
        """Connect both ways with all, and say which view we are in; return the connections to speak on."""
        for endpoint in endpoints:
            sock = dial(endpoint, self._secret, self.endpoint.worker, unix=self._unix)
            sock.sendall(frame(Header(Kind.VIEW, view=view)))
            self._out.append(sock)
        while len(self._in) < len(endpoints):
            sock, _ = self._listener.accept()
            sock.settimeout(WAIT_S)
            try:
                hello = read(sock, handshake.HELLO_BYTES)
                sock.sendall(handshake.challenge(self._secret, hello, secrets.token_bytes(32)))
                read(sock, handshake.PROOF_BYTES)
            except (EOFError, ConnectionError):  # dialled for a view that is over
                sock.close()
                continue
            self._in[handshake.unpack_hello(hello).source] = sock
        return list(self._out)

    def hear(self, worker: str, kind: Kind) -> Header:
        """Return the next frame of a kind that `worker` sends; descriptors and payloads are dropped."""
        deadline = time.monotonic() + WAIT_S
        sock = self._in[worker]
        while time.monotonic() < deadline:
            header = wire.unpack(read(sock, wire.HEADER_BYTES))
            read(sock, header.length + (header.kind is Kind.DATA))
            if header.kind is kind:
                return header
        raise TimeoutError(f"{worker} sent no {kind.name}")


def memfd(size: int, *, seals: int | None = None, flags: int = 0) -> int:
    """Return a descriptor of shared memory, sealed as asked: by default as an honest worker's."""
    import fcntl

    fd = os.memfd_create("hostile", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    try:
        os.ftruncate(fd, size)
        wanted = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if seals is None else seals
        if wanted:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, wanted)
    except OSError:
        os.close(fd)
        raise
    return fd
