"""Which bytes of one segment are free: extents, joined when they touch.

Each extent remembers when memory last came back to it, so that the arena can hand out the warmest one.
Invariants (`validate`, tests/property/test_arena_property.py):
1. Extents are ascending, not empty, inside the segment, and no two touch.
2. What is given back was taken before: giving back free bytes raises InvariantViolated.
Not here: choosing between the extents of several segments, and the memory itself (arena.py, segment.py).
"""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

from elastic_run.runtime.protocol.errors import InvariantViolated


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """Free bytes `[start, stop)`."""

    start: int
    stop: int
    freed_at: int
    """The arena's count of releases when memory last came back here; 0: never used."""


class FreeSpace:
    """The free extents of a segment of `size_bytes`; at first all of it."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._extents = [Extent(start=0, stop=size_bytes, freed_at=0)]

    def __iter__(self) -> Iterator[Extent]:
        return iter(self._extents)

    @property
    def free_bytes(self) -> int:
        return sum(extent.stop - extent.start for extent in self._extents)

    @property
    def freed_at(self) -> int:
        """The newest `freed_at` of all extents; 0 when there is none."""
        return max((extent.freed_at for extent in self._extents), default=0)

    def is_whole(self) -> bool:
        """Return whether nothing of the segment is taken."""
        return len(self._extents) == 1 and self.free_bytes == self._size_bytes

    def take(self, start: int, stop: int) -> None:
        """Take `[start, stop)`, the front of an extent: low bytes go first, so what was ever touched stays a prefix."""
        position = bisect.bisect_left(self._extents, start, key=lambda extent: extent.start)
        if position == len(self._extents) or self._extents[position].start != start:
            raise InvariantViolated(f"no free extent starts at byte {start}")
        extent = self._extents[position]
        if not start < stop <= extent.stop:
            raise InvariantViolated(
                f"bytes {start} to {stop} are not within the free extent that ends at {extent.stop}"
            )
        rest = [Extent(start=stop, stop=extent.stop, freed_at=extent.freed_at)] if stop < extent.stop else []
        self._extents[position : position + 1] = rest

    def give(self, start: int, stop: int, freed_at: int) -> None:
        """Return `[start, stop)`, joined with the free bytes on either side."""
        position = bisect.bisect_left(self._extents, start, key=lambda extent: extent.start)
        first, last = position, position
        joined = Extent(start=start, stop=stop, freed_at=freed_at)
        if position > 0 and self._extents[position - 1].stop >= start:
            first, joined = position - 1, self._join(self._extents[position - 1], joined)
        if position < len(self._extents) and self._extents[position].start <= stop:
            last, joined = position + 1, self._join(joined, self._extents[position])
        self._extents[first:last] = [joined]

    def _join(self, low: Extent, high: Extent) -> Extent:
        if low.stop != high.start:
            raise InvariantViolated(f"bytes {low.start} to {low.stop} and {high.start} to {high.stop} are freed twice")
        return Extent(start=low.start, stop=high.stop, freed_at=max(low.freed_at, high.freed_at))

    def validate(self) -> None:
        """Raise InvariantViolated unless invariant 1 holds."""
        end = -1
        for extent in self._extents:
            if not (end < extent.start < extent.stop <= self._size_bytes):
                raise InvariantViolated(f"free extents of {self._size_bytes} bytes are out of order: {self._extents}")
            end = extent.stop
