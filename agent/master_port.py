"""Keeps a port free for the store that rank 0's worker will open at MASTER_PORT.

The port is bound but not listened on, with SO_REUSEADDR: another socket with SO_REUSEADDR (every TCPStore has it) may
then bind the same port and listen, while the kernel gives it to nobody who asks for any free port, nor to outgoing
connections. All of the host's addresses are covered: TCPStore listens on all of them, in both families if it can.

Invariants (tests/integration/test_master_port.py):
1. While it is reserved a TCPStore can be opened on it, closed, and opened again.
2. While it is reserved no bind to port 0 and no connect is given it.
Not here: who learns the port (driver.py); the store itself (the worker's torch).
"""

import socket

from elastic_run.runtime.protocol.errors import UserError


class ReservedPort:
    """A port kept until close(); also a context manager."""

    def __init__(self, held: socket.socket) -> None:
        self.port: int = held.getsockname()[1]
        self._held = held

    def close(self) -> None:
        """Give the port up; may be called again."""
        self._held.close()

    def __enter__(self) -> "ReservedPort":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def reserve() -> ReservedPort:
    """Reserve a free port on every address of this host. Raises UserError when none is to be had."""
    try:
        return ReservedPort(_bound(socket.AF_INET6, "::"))
    except OSError:  # no IPv6 here, or no port: the second try tells
        try:
            return ReservedPort(_bound(socket.AF_INET, "0.0.0.0"))
        except OSError as error:
            raise UserError(f"no port can be reserved for MASTER_PORT: {error.strerror}; free some ports") from None


def _bound(family: socket.AddressFamily, wildcard: str) -> socket.socket:
    held = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_INET6:
            held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # Only after the port is chosen: with the option first, two reservations could be given the same port.
        held.bind((wildcard, 0))
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    except OSError:
        held.close()
        raise
    return held
