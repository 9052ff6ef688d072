"""Cuts a worker's output into lines for the console.

Invariants (tests/property/test_output_filters.py):
1. The lines do not depend on how the bytes arrived.
2. No byte is lost but line ends; no line is longer than LINE_BYTES_MAX: a longer one comes in pieces.
Not here: moving the bytes (relay.py).
"""

LINE_BYTES_MAX = 64 << 10
"""Higher: a worker that never ends its line holds more memory and is seen later. Lower: real lines are cut."""


class LineCutter:
    """Cuts a byte stream into lines without their ends; `\\r` ends a line too (progress bars), as under torchrun."""

    def __init__(self) -> None:
        self._held: list[bytes] = []  # of the line that has not ended yet, not joined: it may come byte by byte
        self._held_bytes = 0
        self._after_cr = False

    def feed(self, data: bytes) -> list[bytes]:
        """Return the lines that `data` completes; of one longer than LINE_BYTES_MAX, the pieces known so far."""
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
            self._after_cr = False
        if not data:
            return []
        self._after_cr = data.endswith(b"\r")
        lines = data.splitlines()
        ended = data.endswith((b"\r", b"\n"))
        if len(lines) > 1 or ended:
            lines[0] = self._take(lines[0])
        if not ended:
            self._hold(lines.pop())
        if self._held_bytes > LINE_BYTES_MAX:
            *pieces, rest = _pieces(self._take(b""))
            lines += pieces
            self._hold(rest)
        return [piece for line in lines for piece in _pieces(line)]

    def end(self) -> list[bytes]:
        """Return the last line when the stream ended within it."""
        return [self._take(b"")] if self._held else []

    def _hold(self, part: bytes) -> None:
        self._held.append(part)
        self._held_bytes += len(part)

    def _take(self, rest: bytes) -> bytes:
        """Return the held line with its rest, and hold nothing any more."""
        line = b"".join([*self._held, rest])
        self._held.clear()
        self._held_bytes = 0
        return line


def prefixed(prefix: bytes, lines: list[bytes]) -> bytes:
    """Return the bytes that show `lines` on the console."""
    return b"".join(prefix + line + b"\n" for line in lines)


def _pieces(line: bytes) -> list[bytes]:
    if len(line) <= LINE_BYTES_MAX:
        return [line]
    return [line[start : start + LINE_BYTES_MAX] for start in range(0, len(line), LINE_BYTES_MAX)]
