"""Settings of a mesh. Every member of a job uses the same."""

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from elastic_run.collectives.endpoint import Endpoint
from elastic_run.runtime.protocol.errors import UserError

MIB = 1 << 20
UNSENT_BYTES = 256 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshOptions:
    """Resolved once, when the mesh is made."""

    listen_address: str = "127.0.0.1"
    """Address other hosts reach this worker at. Loopback: the job lives on one host."""
    listen_port: int = 0
    """0: one that is free; the mesh's endpoint says which. Fixed: others can know it beforehand (`at`)."""
    host_key: str | None = None
    """Members with the same one share memory. None: what tells this kernel and network namespace from every other."""
    shared_memory: bool = True
    """Off: workers of one host talk TCP as strangers do (for measurements, and where memfd is forbidden)."""
    arena_bytes: int = 1 << 30
    """Shared memory of this worker; more is taken only where the oldest operation of a group would have to wait. Lower:
    large operations go in more pieces; higher: more memory per host."""
    scratch_bytes: int = 512 * MIB
    """Temporary memory kept for the next operation. Lower: large operations touch fresh pages, at several times the
    cost of a copy; higher: more memory that only operations use."""
    peer_segments_bytes: int = 4 << 30
    """Bound of what one peer may have us map, and so of its shared memory: operations that cannot do with it fail."""
    stage_bytes: int = 4 * MIB
    """Piece of a large message through shared memory."""
    chunk_bytes: int = MIB
    """Piece of a large message through TCP. Lower: more system calls; higher: uneven stripes."""
    pipe_buffer_bytes: int = 512 << 10
    """The same on loopback for pipes, whose bytes are read at once. Lower: more turns; higher: less stays in cache."""
    socket_buffer_bytes: int = 4 * MIB
    """Send and receive buffer asked of the kernel, which may give less. 0: leave it to the kernel."""
    congestion_control: str = "cubic"
    """Where the kernel allows it, on loopback only: bbr paces loopback traffic down (docs: ARCHITECTURE.md)."""
    lanes_max: int = 4
    """TCP connections per direction and peer."""

    @staticmethod
    def at(address: str, port: int) -> "MeshOptions":
        """Return the options of a worker that the others know as `Endpoint.at(worker, address, port)`."""
        return MeshOptions(listen_address=address, listen_port=port, host_key=address)

    @staticmethod
    def from_environment(environment: Mapping[str, str], **given: str) -> "MeshOptions":
        """Read ELASTIC_COLLECTIVES_*. Raises UserError."""
        transport = environment.get("ELASTIC_COLLECTIVES_TRANSPORT", "auto")
        if transport not in ("auto", "tcp"):
            raise UserError(f"ELASTIC_COLLECTIVES_TRANSPORT={transport!r}: take auto or tcp")
        address = given.get("listen_address") or environment.get("ELASTIC_COLLECTIVES_ADDRESS") or "127.0.0.1"
        return MeshOptions(listen_address=address, shared_memory=transport == "auto")

    def dialler(self, endpoint: Endpoint, *, local: bool, pipe: bool = False) -> Callable[[], socket.socket]:
        """Return what begins a connection without waiting for it. It raises OSError."""

        def dial_unix() -> socket.socket:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            try:
                sock.connect(b"\0" + endpoint.unix.encode())
            except OSError:
                sock.close()
                raise
            return sock

        def dial_tcp() -> socket.socket:
            family = socket.AF_INET6 if ":" in endpoint.address else socket.AF_INET
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            try:
                self.tune(sock, endpoint.address)
                if pipe:
                    self.tune_pipe(sock, endpoint.address)
                sock.connect((endpoint.address, endpoint.port))
            except BlockingIOError:
                pass
            except OSError:
                sock.close()
                raise
            return sock

        return dial_unix if local else dial_tcp

    def tune(self, sock: socket.socket, address: str) -> None:
        """Set what our traffic wants; what the kernel refuses is left as it is."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if address not in ("127.0.0.1", "::1"):
            # A socket takes the next chunk when its window is free, not when its buffer is.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        if self.socket_buffer_bytes and address in ("127.0.0.1", "::1"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.socket_buffer_bytes)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.socket_buffer_bytes)
            if self.congestion_control:
                try:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, self.congestion_control.encode())
                except OSError:
                    return

    def tune_pipe(self, sock: socket.socket, address: str) -> None:
        """On top of `tune`, for a connection that carries no frames."""
        if self.pipe_buffer_bytes and address in ("127.0.0.1", "::1"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.pipe_buffer_bytes)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.pipe_buffer_bytes)


def this_process_options(listen_address: str | None = None) -> MeshOptions:
    """Return the options the environment asks for. Raises UserError."""
    return MeshOptions.from_environment(os.environ, **({"listen_address": listen_address} if listen_address else {}))
