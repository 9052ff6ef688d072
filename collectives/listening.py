"""The two sockets a worker is reached at: TCP for other hosts, an abstract unix socket for members of the same host.

Not here: who is let in (inbound.py, mesh.py).
"""

import os
import secrets
import socket

from elastic_run.collectives.endpoint import unix_name_of
from elastic_run.collectives.options import MeshOptions
from elastic_run.runtime.protocol.errors import PeerError

BACKLOG = 512


def listen(options: MeshOptions) -> tuple[socket.socket, socket.socket, str]:
    """Return the TCP listener, the unix listener and its name. Raises PeerError."""
    address, port = options.listen_address, options.listen_port
    # Of a fixed port the others compute the name; a random one cannot be taken by somebody else first.
    name = unix_name_of(address, port) if port else f"elastic-collectives-{os.getpid()}-{secrets.token_hex(8)}"
    try:
        tcp = _listener(socket.AF_INET6 if ":" in address else socket.AF_INET, (address, port))
    except OSError as error:
        raise PeerError(f"cannot listen on {address}, port {port}: {error.strerror}") from None
    try:
        unix = _listener(socket.AF_UNIX, b"\0" + name.encode())
    except OSError as error:
        tcp.close()
        raise PeerError(f"cannot listen on the abstract unix socket {name}: {error.strerror}") from None
    return tcp, unix, name


def _listener(family: socket.AddressFamily, address: tuple[str, int] | bytes) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a fixed port is ours again after a restart
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock
