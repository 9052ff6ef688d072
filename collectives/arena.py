"""This worker's staging memory for peers of the same host: who holds which bytes of its segments.

Invariants (`validate`, tests/property/test_arena_property.py):
1. Regions never overlap; a region's bytes go to nobody else until its owner has released it and no peer holds it.
2. A generation is never used twice, and the word before the data is overwritten before the bytes are given away again:
   a reader that stalled until its hold was dropped can see that it read something else (`PeerSegments.check`).
3. The segments together never exceed the hard limit; above the limit only `beyond` gets new memory.
A segment lives while any region of it does: hold a region before its segment's descriptor is queued for the peer.
Not thread safe: only the engine's thread calls it. After a fork only the parent may (segment.py: what a child may do).
Not here: the memory (segment.py); the reading side (peer_segments.py); passing descriptors (the links).
"""

import secrets
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from elastic_run.collectives.errors import CollectiveError
from elastic_run.collectives.free_space import Extent
from elastic_run.collectives.segment import HEADER_BYTES, SEGMENTS_MAX, Segment
from elastic_run.runtime.protocol.errors import CodecError, InvariantViolated

GRAIN_BYTES = 4096
"""Regions, their headers included, are whole pages: keeps the free lists short."""
SEGMENT_BYTES_MIN = 1 << 20
SEGMENT_SLACK_BYTES = 64 << 10
"""On top of a power of two, for headers: without it a tensor of 64 MiB would need a segment of 128 MiB."""
REGIONS_MAX = 4096
"""Bounds the search for free memory to well under a millisecond."""
GENERATION_START_BITS = 62
"""Generations count from a random number: later data that lies where a header was does not look like one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Region:
    """Bytes of our own memory, the owner's until `Arena.release_owner`."""

    segment: int
    offset: int
    """Of the data within the segment, a multiple of 64."""
    nbytes: int
    generation: int
    tensor: Tensor
    """uint8, one dimension."""
    bytes: memoryview
    """The same memory."""


@dataclass(slots=True, kw_only=True)
class Tenancy:
    """Who keeps a region from being free."""

    region: Region
    start: int
    stop: int
    user: Hashable = None
    owned: bool = True
    peers: dict[str, int] = field(default_factory=dict)
    """Worker id -> how many times it holds the region."""


class Arena:
    """At most `limit_bytes` of shared memory, and up to `hard_limit_bytes` for those who must not wait.

    `on_retire` is called with the number of each segment given back. Peers need not be told: the segment itself says
    so, and they drop it when they map the next one.
    """

    def __init__(
        self, limit_bytes: int, on_retire: Callable[[int], None] | None = None, *, hard_limit_bytes: int | None = None
    ) -> None:
        self._limit_bytes = limit_bytes - limit_bytes % GRAIN_BYTES
        self._hard_limit_bytes = max(self._limit_bytes, hard_limit_bytes or 0)
        self._on_retire = on_retire
        self._segments: dict[int, Segment] = {}
        self._tenancies: dict[int, Tenancy] = {}
        self._segments_made = 0
        self._generation = secrets.randbits(GENERATION_START_BITS)
        self._releases = 0
        self._leaving = False
        self._closed = False

    @property
    def segment_bytes(self) -> int:
        """What the limit bounds; pages never used take no memory."""
        return sum(segment.size_bytes for segment in self._segments.values())

    @property
    def used_bytes(self) -> int:
        """Bytes of regions that are not free, headers and rounding included."""
        return sum(tenancy.stop - tenancy.start for tenancy in self._tenancies.values())

    def allocate(self, nbytes: int, user: Hashable = None, *, beyond: bool = False) -> Region | None:
        """Return a region of the warmest memory that fits; None: the limit is reached, ask again after a release.

        `beyond`: the limit is no reason to wait, unless peers still hold what the same `user` gave up.
        Raises ValueError when the limit is too low for it at any time, CollectiveError when the system has no memory or
        the hard limit is reached.
        """
        if self._closed:
            raise InvariantViolated("allocation from a closed arena")
        if nbytes < 0:
            raise ValueError(f"cannot allocate {nbytes} bytes")
        needed_bytes = -(-(HEADER_BYTES + nbytes) // GRAIN_BYTES) * GRAIN_BYTES
        if needed_bytes > self._limit_bytes:
            raise ValueError(f"{nbytes} bytes never fit in an arena of {self._limit_bytes} bytes")
        place = self._place(nbytes, needed_bytes)
        if place is None:
            if not beyond or self._lent(user):
                return None
            place = self._beyond(nbytes, needed_bytes)
        segment, start = place
        # Before it is taken: when the system has no memory, nothing has changed.
        segment.back(start + needed_bytes)
        segment.free.take(start, start + needed_bytes)
        return self._settle(segment, start, start + needed_bytes, nbytes, user)

    def find(self, generation: int) -> Region | None:
        """Return the region with that generation, unless it is free again."""
        tenancy = self._tenancies.get(generation)
        return tenancy.region if tenancy is not None else None

    def hold(self, region: Region, peer: str) -> None:
        """Note that `peer` was told of the region: one more `release` by it is due. Only before `release_owner`."""
        tenancy = self._tenancies.get(region.generation)
        if tenancy is None or not tenancy.owned:
            raise InvariantViolated(f"region {region.generation} was released, and is now offered to {peer}")
        tenancy.peers[peer] = tenancy.peers.get(peer, 0) + 1

    def release(self, region: Region, peer: str) -> None:
        """Take back one hold of `peer`. Raises CodecError when it has none: its link is not to be trusted."""
        tenancy = self._tenancies.get(region.generation)
        if tenancy is None or peer not in tenancy.peers:
            raise CodecError(f"{peer} releases region {region.generation}, which it does not hold")
        tenancy.peers[peer] -= 1
        if tenancy.peers[peer] == 0:
            del tenancy.peers[peer]
            self._free_if_unused(tenancy)

    def release_owner(self, region: Region) -> None:
        """Give the region up; its tensor must not be used any more. The memory is free once no peer holds it."""
        tenancy = self._tenancies.get(region.generation)
        if tenancy is None or not tenancy.owned:
            raise InvariantViolated(f"region {region.generation} is released twice by its owner")
        tenancy.owned = False
        self._free_if_unused(tenancy)

    def drop_peer(self, peer: str, keep: Mapping[int, int] | None = None) -> None:
        """Release what `peer` holds: its link is gone, and with it whatever it would have released.

        `keep`: generation -> holds of which it was not told yet, and will be.
        """
        for generation, tenancy in list(self._tenancies.items()):
            if tenancy.peers.pop(peer, None) is not None:
                kept = keep.get(generation, 0) if keep else 0
                if kept:
                    tenancy.peers[peer] = kept
                self._free_if_unused(tenancy)

    def fd_of(self, segment: int) -> int:
        """Return the descriptor to pass to a peer. It stays the arena's."""
        return self._segment(segment).fd

    def size_of(self, segment: int) -> int:
        return self._segment(segment).size_bytes

    def trim(self, keep_bytes: int = 0) -> int:
        """Give back segments that are entirely free, coldest first, until at most `keep_bytes` of such are left.

        Returns the bytes given back. The memory is the system's again even where a peer has not dropped its mapping.
        """
        free = self._free_segments()
        left_bytes = sum(segment.size_bytes for segment in free)
        given_bytes = 0
        for segment in free:
            if left_bytes - given_bytes <= keep_bytes:
                break
            given_bytes += segment.size_bytes
            self._retire(segment)
        return given_bytes

    def leave(self) -> None:
        """Give no memory away again: peers that still read it find it as it is, also after `close`."""
        self._leaving = True

    def close(self) -> None:
        """Let go of all segments. Peers that map them can finish reading. Only `close` may be called afterwards."""
        self._closed = True
        for segment in self._segments.values():
            segment.close()
        self._segments.clear()
        self._tenancies.clear()

    def validate(self) -> None:
        """Raise InvariantViolated unless the invariants of the module hold."""
        if self.segment_bytes > self._hard_limit_bytes or len(self._segments) > SEGMENTS_MAX:
            raise InvariantViolated(f"{len(self._segments)} segments of {self.segment_bytes} bytes exceed the limit")
        free_bytes = 0
        for segment in self._segments.values():
            segment.free.validate()
            free_bytes += segment.free.free_bytes
            ends = sorted((t.start, t.stop) for t in self._tenancies.values() if t.region.segment == segment.number)
            ends += [(extent.start, extent.stop) for extent in segment.free]
            ends.sort()
            covered = [0, *(stop for _, stop in ends)]
            if [start for start, _ in ends] != covered[:-1] or covered[-1] != segment.size_bytes:
                raise InvariantViolated(f"segment {segment.number} is not exactly covered: {ends}")
        for generation, tenancy in self._tenancies.items():
            word = self._segment(tenancy.region.segment).mapping.generation(tenancy.region.offset)
            if word != generation or not (tenancy.owned or tenancy.peers):
                raise InvariantViolated(f"region {generation} has header {word}, {tenancy}")

    def _segment(self, number: int) -> Segment:
        segment = self._segments.get(number)
        if segment is None:
            raise InvariantViolated(f"there is no segment {number}")
        return segment

    def _place(self, nbytes: int, needed_bytes: int) -> tuple[Segment, int] | None:
        """Return free memory within the limit."""
        if len(self._tenancies) >= REGIONS_MAX:
            return None
        if self.segment_bytes > self._limit_bytes and self.used_bytes + needed_bytes > self._limit_bytes:
            return None
        return self._find(needed_bytes) or self._grow(nbytes, needed_bytes, self._limit_bytes)

    def _beyond(self, nbytes: int, needed_bytes: int) -> tuple[Segment, int]:
        """Return free memory within the hard limit. Raises CollectiveError when there is none."""
        place = None
        if len(self._tenancies) < REGIONS_MAX:
            place = self._find(needed_bytes) or self._grow(nbytes, needed_bytes, self._hard_limit_bytes)
        if place is None:
            raise CollectiveError(
                f"no {nbytes} bytes of shared memory for another operation: {self.used_bytes} bytes in"
                f" {len(self._tenancies)} regions are in use, and peers map no more than {self._hard_limit_bytes}"
            )
        return place

    def _lent(self, user: Hashable) -> bool:
        return any(tenancy.user == user and not tenancy.owned for tenancy in self._tenancies.values())

    def _find(self, needed_bytes: int) -> tuple[Segment, int] | None:
        best: tuple[Segment, Extent] | None = None
        best_rank = (False, -1)
        for segment in self._segments.values():
            for extent in segment.free:
                stop = extent.start + needed_bytes
                rank = (stop <= segment.backed_bytes, extent.freed_at)
                if stop <= extent.stop and rank > best_rank:
                    best, best_rank = (segment, extent), rank
        return (best[0], best[1].start) if best is not None else None

    def _grow(self, nbytes: int, needed_bytes: int, limit_bytes: int) -> tuple[Segment, int] | None:
        """Make a segment, as large as all before it together where the limit allows: so there are few of them."""
        room_bytes = self._make_room(needed_bytes, limit_bytes)
        if room_bytes < needed_bytes:
            return None
        within = limit_bytes == self._limit_bytes  # beyond, what is taken is wanted back soon
        doubled_bytes = 1 << (self.segment_bytes.bit_length() - 1) if self._segments and within else 0
        fitting_bytes = 1 << max(0, nbytes - 1).bit_length()
        wanted_bytes = max(SEGMENT_BYTES_MIN, doubled_bytes, fitting_bytes) + SEGMENT_SLACK_BYTES
        segment = Segment(self._segments_made + 1, min(wanted_bytes, room_bytes))
        self._segments_made += 1
        self._segments[segment.number] = segment
        return segment, 0

    def _make_room(self, needed_bytes: int, limit_bytes: int) -> int:
        """Return how large a new segment may be, after retiring as few free ones as that takes; none if in vain."""
        free = self._free_segments()
        room_bytes = limit_bytes - self.segment_bytes
        if room_bytes + sum(segment.size_bytes for segment in free) < needed_bytes:
            return 0
        for segment in free:
            if room_bytes >= needed_bytes and len(self._segments) < SEGMENTS_MAX:
                break
            room_bytes += segment.size_bytes
            self._retire(segment)
        return room_bytes if len(self._segments) < SEGMENTS_MAX else 0

    def _free_segments(self) -> list[Segment]:
        whole = (segment for segment in self._segments.values() if segment.free.is_whole())
        return sorted(whole, key=lambda segment: segment.free.freed_at)

    def _retire(self, segment: Segment) -> None:
        del self._segments[segment.number]
        segment.mapping.discard()
        segment.close()
        if self._on_retire is not None:
            self._on_retire(segment.number)

    def _settle(self, segment: Segment, start: int, stop: int, nbytes: int, user: Hashable) -> Region:
        self._generation += 1
        offset = start + HEADER_BYTES
        segment.mapping.set_generation(offset, self._generation)
        region = Region(
            segment=segment.number,
            offset=offset,
            nbytes=nbytes,
            generation=self._generation,
            tensor=segment.mapping.tensor[offset : offset + nbytes],
            bytes=segment.mapping.bytes[offset : offset + nbytes],
        )
        self._tenancies[region.generation] = Tenancy(region=region, start=start, stop=stop, user=user)
        return region

    def _free_if_unused(self, tenancy: Tenancy) -> None:
        if tenancy.owned or tenancy.peers or self._leaving:
            return
        region = tenancy.region
        segment = self._segment(region.segment)
        # The next region here may begin elsewhere and never write this word; a stalled reader must see it change.
        segment.mapping.set_generation(region.offset, 0)
        self._releases += 1
        segment.free.give(tenancy.start, tenancy.stop, self._releases)
        del self._tenancies[region.generation]
        if segment.free.is_whole() and self.segment_bytes > self._limit_bytes:
            self._retire(segment)
