"""The shared memory of ONE peer, as this worker reads it.

Invariants (tests/unit/test_arena.py):
1. What the peer announces is checked; a place outside a mapped segment raises CodecError, and is never touched.
2. Tensors keep their mapping alive: they stay readable after `drop` and `close`, and after the peer's death.
3. The mapped segments together never exceed the limit.
Not thread safe: only the engine's thread calls it.
Not here: mapping (segment.py); the owner's side (arena.py); receiving descriptors (the links).
"""

import os

from torch import Tensor

from elastic_run.collectives.segment import HEADER_BYTES, SEGMENTS_MAX, Mapping, map_received
from elastic_run.runtime.protocol.errors import CodecError

ALIGN_BYTES = 64


class PeerSegments:
    """At most `limit_bytes` of one peer's segments, by the numbers the peer gave them."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._mappings: dict[int, Mapping] = {}

    def add(self, segment: int, fd: int, size_bytes: int, *, writable: bool = False) -> None:
        """Map a received segment, and drop those that the peer has retired; `fd` is closed, also on error.

        Raises CodecError when the announcement is wrong, CollectiveError when the system cannot map it.
        """
        try:
            for retired in [number for number, mapping in self._mappings.items() if not mapping.living]:
                del self._mappings[retired]
            if segment in self._mappings:
                raise CodecError(f"segment {segment} is announced twice")
            total_bytes = sum(mapping.size_bytes for mapping in self._mappings.values()) + size_bytes
            if size_bytes <= 0 or total_bytes > self._limit_bytes or len(self._mappings) >= SEGMENTS_MAX:
                raise CodecError(
                    f"segment {segment} of {size_bytes} bytes, after {len(self._mappings)} others, makes"
                    f" {total_bytes} bytes; allowed are {SEGMENTS_MAX} with {self._limit_bytes} bytes"
                )
            self._mappings[segment] = map_received(fd, size_bytes, writable=writable)
        finally:
            os.close(fd)

    def view(self, segment: int, offset: int, nbytes: int) -> Tensor:
        """Return the data of a region, uint8, one dimension. Unless the segment is mapped writable, only read it.

        Raises CodecError when there is no such place.
        """
        mapping = self._mappings.get(segment)
        if mapping is None:
            raise CodecError(f"segment {segment} was never announced, or was dropped")
        self._check_place(mapping, segment, offset, nbytes)
        return mapping.tensor[offset : offset + nbytes]

    def check(self, segment: int, offset: int, generation: int) -> bool:
        """Return whether the region there is still the one with `generation`. To be called after having read it:

        False says that the owner may have given the memory to somebody else meanwhile, so what was read is void.
        """
        mapping = self._mappings.get(segment)
        if mapping is None or generation == 0:
            return False
        self._check_place(mapping, segment, offset, 0)
        return mapping.generation(offset) == generation

    def drop(self, segment: int) -> None:
        """Forget a segment; one that is not mapped here is no matter."""
        self._mappings.pop(segment, None)

    def close(self) -> None:
        self._mappings.clear()

    def _check_place(self, mapping: Mapping, segment: int, offset: int, nbytes: int) -> None:
        if offset < HEADER_BYTES or offset % ALIGN_BYTES or nbytes < 0 or offset + nbytes > mapping.size_bytes:
            raise CodecError(
                f"no region of {nbytes} bytes can be at byte {offset} of segment {segment}"
                f" ({mapping.size_bytes} bytes, regions begin at multiples of {ALIGN_BYTES} after a header)"
            )
