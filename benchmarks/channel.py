"""Lines of JSON over a socket between a benchmark and the processes it measures; standard library only.

Invariants: 1. a wait is bounded; 2. the end of the other side is an error, never an endless read.
"""

import json
import select
import socket
from typing import Any

READ_BYTES = 1 << 16
LINE_BYTES_MAX = 1 << 22


class ChannelClosed(Exception):
    """The other side is gone, or said more than a line may hold."""


class Channel:
    """One side of a socket pair; blocking."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._read = bytearray()

    def fileno(self) -> int:
        return self._end.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Raises ChannelClosed."""
        try:
            self._end.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive(self, timeout_s: float | None = None) -> dict[str, Any]:
        """The next message. Raises ChannelClosed, and TimeoutError after `timeout_s` without it."""
        while b"\n" not in self._read:
            readable, _, _ = select.select([self._end], [], [], timeout_s)
            if not readable:
                raise TimeoutError(f"nothing said for {timeout_s} s")
            self._fill()
        line, _, rest = bytes(self._read).partition(b"\n")
        self._read = bytearray(rest)
        message: dict[str, Any] = json.loads(line)
        return message

    def poll(self) -> dict[str, Any] | None:
        """The next message if it is there. Raises ChannelClosed."""
        if b"\n" not in self._read and not select.select([self._end], [], [], 0)[0]:
            return None
        return self.receive()

    def close(self) -> None:
        self._end.close()

    def _fill(self) -> None:
        try:
            found = self._end.recv(READ_BYTES)
        except OSError as error:
            raise ChannelClosed(str(error)) from error
        if not found:
            raise ChannelClosed("the other side is gone")
        self._read += found
        if len(self._read) > LINE_BYTES_MAX:
            raise ChannelClosed(f"a line of more than {LINE_BYTES_MAX} bytes")
