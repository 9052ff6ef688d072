"""One direction between two hosts of the laboratory: which frames are lost, and when the others arrive. Pure.

A frame first waits for its turn on a line of the set rate, then travels for the delay plus a random part of the jitter.

Invariants (tests/unit/test_network_direction.py):
1. No frame arrives before its delay is over, and none overtakes another, whatever the jitter.
2. Over any stretch of time at an unchanged rate the line carries at most that rate: there is no burst allowance.
3. Waiting frames are bounded in bytes; each frame dropped is counted under its cause.
4. A new shape applies to the frames under way as well: cutting the line loses them, healing it does not strand them.
Not here: devices and the clock (relay.py).
"""

import random
from collections import deque
from dataclasses import dataclass, fields

from elastic_run.runtime.protocol.errors import UserError

BITS = 8
DELAY_S_MAX = 3600.0
QUEUE_BYTES = 262_144
"""What may wait for its turn on a limited line: 0.1 s at 20 Mbit/s. More only adds delay, less starves a stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How a direction treats frames. Sizes and rates count whole Ethernet frames: 1514 bytes for 1448 of TCP."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    """Added to the delay: uniform between nothing and this."""
    loss: float = 0.0
    """Probability that a frame is lost, each by itself."""
    rate_bits_per_s: float | None = None
    queue_bytes: int = QUEUE_BYTES
    blocked: bool = False

    def __post_init__(self) -> None:
        """Refuse what no line can be.

        Raises:
            UserError: a value is out of its range; the message names it.
        """
        if not 0.0 <= self.delay_s <= DELAY_S_MAX or not 0.0 <= self.jitter_s <= DELAY_S_MAX:
            raise UserError(f"delay_s {self.delay_s} and jitter_s {self.jitter_s} must lie in 0..{DELAY_S_MAX}")
        if not 0.0 <= self.loss <= 1.0:
            raise UserError(f"loss {self.loss} is a probability: it must lie in 0..1")
        if self.rate_bits_per_s is not None and not 0.0 < self.rate_bits_per_s < float("inf"):
            raise UserError(f"rate_bits_per_s {self.rate_bits_per_s} must be positive, or None for no limit")
        if self.queue_bytes <= 0:
            raise UserError(f"queue_bytes {self.queue_bytes} must be positive")


@dataclass(slots=True, kw_only=True)
class Counters:
    """What became of the frames of a direction since the laboratory was opened."""

    offered_frames: int = 0
    delivered_frames: int = 0
    delivered_bytes: int = 0
    dropped_blocked: int = 0
    dropped_by_loss: int = 0
    dropped_queue_full: int = 0
    dropped_memory_full: int = 0
    """The bound on frames under way was met: the laboratory was asked to hold more than it may."""
    dropped_by_device: int = 0
    """The receiving device refused the frame."""

    def as_numbers(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


class Direction:
    """The line from one host to one other. `now_s` never goes back from call to call."""

    def __init__(self, *, chance: random.Random, in_flight_bytes_max: int) -> None:
        self.shape = Shape()
        self.counters = Counters()
        self._chance = chance
        self._in_flight_bytes_max = in_flight_bytes_max
        self._under_way: deque[tuple[float, bytes]] = deque()
        self._under_way_bytes = 0
        self._line_free_s = 0.0
        self._last_due_s = 0.0

    def offer(self, frame: bytes, now_s: float) -> bool:
        """Take a frame from the sender; return True, and keep nothing, when it is to be delivered at once."""
        counters, shape = self.counters, self.shape
        counters.offered_frames += 1
        if shape.blocked:
            counters.dropped_blocked += 1
            return False
        if shape.loss and self._chance.random() < shape.loss:
            counters.dropped_by_loss += 1
            return False
        if shape.rate_bits_per_s is not None:
            waiting_bytes = (self._line_free_s - now_s) * shape.rate_bits_per_s / BITS
            if waiting_bytes > shape.queue_bytes:
                counters.dropped_queue_full += 1
                return False
        if self._under_way_bytes + len(frame) > self._in_flight_bytes_max:
            counters.dropped_memory_full += 1
            return False
        due_s = self._due_s(len(frame), now_s)
        if due_s <= now_s and not self._under_way:
            return True
        self._under_way.append((due_s, frame))
        self._under_way_bytes += len(frame)
        return False

    def arrived(self, now_s: float) -> list[bytes]:
        """Take out the frames whose time has come, in order."""
        under_way, frames = self._under_way, []
        while under_way and under_way[0][0] <= now_s:
            frame = under_way.popleft()[1]
            self._under_way_bytes -= len(frame)
            frames.append(frame)
        return frames

    def next_due_s(self) -> float | None:
        """When the next frame arrives; None while none is under way."""
        return self._under_way[0][0] if self._under_way else None

    def reshape(self, shape: Shape, now_s: float) -> None:
        """Change the line. Frames under way are sent again as of now, but arrive no later than they would have."""
        self.shape = shape
        earlier = self._under_way
        self._under_way = deque()
        self._line_free_s = self._last_due_s = now_s
        if shape.blocked:
            self.counters.dropped_blocked += len(earlier)
            self._under_way_bytes = 0
            return
        for due_s, frame in earlier:
            self._under_way.append((min(due_s, self._due_s(len(frame), now_s)), frame))

    def _due_s(self, frame_bytes: int, now_s: float) -> float:
        """Put a frame on the line and return when it arrives at the other end."""
        shape, left_s = self.shape, now_s
        if shape.rate_bits_per_s is not None:
            left_s = max(now_s, self._line_free_s) + frame_bytes * BITS / shape.rate_bits_per_s
            self._line_free_s = left_s
        due_s = left_s + shape.delay_s
        if shape.jitter_s:
            due_s += self._chance.uniform(0.0, shape.jitter_s)
        self._last_due_s = max(due_s, self._last_due_s)
        return self._last_due_s
