"""Messages in both directions with one peer, matched by key (group, sequence, slot) within one view.

Small messages travel at once and may arrive before they are waited for (kept, up to UNEXPECTED_BYTES_MAX); large ones
wait until the receiver's buffer is ready (GRANT), so they are received in place. Point-to-point messages match in the
order they were sent per (group, tag); large ones are announced (OFFER).
Not here: sockets (outbound.py, inbound.py); who sends what when (peer.py).
"""

import bisect
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from elastic_run.collectives.pending import Pending
from elastic_run.collectives.wire import FrameError, RegionRef

EAGER_BYTES_MAX = 32 << 10
"""Larger messages wait for a grant: half a round trip against one copy of the bytes."""
UNEXPECTED_BYTES_MAX = 64 << 20
"""Of one peer. Who sends more unasked is disconnected: to stop reading could stop two honest members for good."""
UNTAKEN_BYTES_MAX = 16 << 20
"""Small point-to-point messages sent to one peer and not received by it. More are offered, as large ones are."""
KEPT_OVERHEAD_BYTES = 512
"""What a kept message takes besides its bytes: with it one bound does for large and for empty ones."""
PIECES_MAX = 4096
"""Of one message, with gaps between them. A stalled connection of four leaves one gap per chunk it holds up."""


class Key(NamedTuple):
    group: int
    sequence: int
    slot: int


class Send(Pending):
    """A message that leaves; done when its last byte was handed to the transport."""

    __slots__ = ("buffer", "check", "keep", "key", "next_offset", "unsent")

    def __init__(self, peer: str, key: Key, check: int, buffer: memoryview, keep: object) -> None:
        super().__init__(peer)
        self.key = key
        self.check = check
        self.buffer = buffer
        self.keep = keep
        """What owns the buffer's memory."""
        self.next_offset = 0  # first byte that no chunk has taken
        self.unsent = len(buffer)


class Receive(Pending):
    """A message waited for, received in place; done when its last byte is there."""

    __slots__ = ("buffer", "check", "key", "missing", "on_match", "pieces", "source")

    def __init__(self, peer: str, key: Key, check: int, buffer: memoryview) -> None:
        super().__init__(peer)
        self.key = key
        self.check = check
        self.buffer = buffer
        self.missing = len(buffer)
        self.pieces: list[tuple[int, int]] = []
        """Where its bytes came or are coming, `[start, stop)`: ascending, no two touch."""
        self.source: str | None = None
        self.on_match: deque[Queue] | None = None
        """Point-to-point from any source: the queues in which it waits."""

    def claim(self, start: int, nbytes: int) -> None:
        """Note that a piece comes. Raises FrameError when some of it came already: it would count for what did not."""
        if not nbytes:
            return
        pieces, stop = self.pieces, start + nbytes
        at = bisect.bisect_left(pieces, (start, stop))
        before = pieces[at - 1] if at else (-1, -1)
        after = pieces[at] if at < len(pieces) else (-1, -1)
        if before[1] > start or -1 < after[0] < stop:
            raise FrameError(f"bytes {start} to {stop} of a message came twice in part or whole")
        joined = (before[0] if before[1] == start else start, after[1] if after[0] == stop else stop)
        pieces[at - (before[1] == start) : at + (after[0] == stop)] = [joined]
        if len(pieces) > PIECES_MAX:
            raise FrameError(f"a message came in more than {PIECES_MAX} pieces that do not touch")


class Fetch(Pending):
    """A region of the peer's shared memory waited for."""

    __slots__ = ("check", "counted", "key", "nbytes", "region")

    def __init__(self, peer: str, key: Key, check: int, nbytes: int | None = None, *, counted: bool = True) -> None:
        """With `nbytes` a region of another size is a mismatch. `counted`: it holds as many bytes of the operation."""
        super().__init__(peer)
        self.key = key
        self.check = check
        self.nbytes = nbytes
        self.counted = counted
        self.region: RegionRef | None = None


class Arrived(NamedTuple):
    """A message nobody waited for yet: its bytes, or where they are, or (neither) an offer of `total` bytes."""

    check: int
    total: int
    data: bytearray | None = None
    region: RegionRef | None = None

    @property
    def kept_bytes(self) -> int:
        return KEPT_OVERHEAD_BYTES + len(self.data or b"")


@dataclass(slots=True)
class Queue:
    """Point-to-point messages of one peer, group and tag: taken in the order they were sent."""

    peer: str
    next_sequence: int = 0
    arrived: dict[int, Arrived] = field(default_factory=dict)
    waiting: deque[Receive] = field(default_factory=deque)


@dataclass(slots=True)
class Inbox:
    """What one peer sent or is expected to send in this view."""

    posted: dict[Key, "Receive | Fetch"] = field(default_factory=dict)
    arrived: dict[Key, Arrived] = field(default_factory=dict)
    queues: dict[tuple[int, int], Queue] = field(default_factory=dict)
    kept_bytes: int = 0

    def regions(self, group: int | None = None) -> list[RegionRef]:
        """Return the shared memory that was shown to us and not looked at yet; of one group, or of all."""
        return [
            arrived.region
            for key, arrived in self.arrived.items()
            if arrived.region is not None and group in (None, key.group)
        ]

    def clear(self) -> None:
        self.posted.clear()
        self.arrived.clear()
        self.queues.clear()
        self.kept_bytes = 0

    def clear_group(self, group: int) -> None:
        self.posted = {key: value for key, value in self.posted.items() if key.group != group}
        for key in [key for key in self.arrived if key.group == group]:
            self.take(key)
        for place in [place for place in self.queues if place[0] == group]:
            for arrived in self.queues.pop(place).arrived.values():
                self.kept_bytes -= arrived.kept_bytes

    def keep(self, key: Key, arrived: Arrived) -> None:
        """Raises FrameError when the peer says the same twice, or more than is kept for it."""
        if key in self.arrived:
            raise FrameError("a message was sent twice")
        self.arrived[key] = arrived
        self.kept_bytes += arrived.kept_bytes
        self.check_room()

    def take(self, key: Key) -> Arrived | None:
        arrived = self.arrived.pop(key, None)
        if arrived is not None:
            self.kept_bytes -= arrived.kept_bytes
        return arrived

    def queue(self, group: int, slot: int, peer: str) -> Queue:
        place = (group, slot)
        queue = self.queues.get(place)
        if queue is None:
            queue = self.queues[place] = Queue(peer)
        return queue

    def check_room(self) -> None:
        if self.kept_bytes > UNEXPECTED_BYTES_MAX:
            raise FrameError(f"more than {UNEXPECTED_BYTES_MAX >> 20} MiB of small messages that nobody waits for")
