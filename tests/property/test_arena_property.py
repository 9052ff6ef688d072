"""Random use of an arena against an oracle that paints every byte with its region's colour."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_run.collectives.arena import GRAIN_BYTES, Arena, Region
from elastic_run.collectives.errors import CollectiveError
from elastic_run.collectives.free_space import FreeSpace
from elastic_run.collectives.segment import HEADER_BYTES

HARD = 2
"""Times the limit."""
PEERS = ("a", "b", "c")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), st.integers(0, 40 * GRAIN_BYTES)),
        st.tuples(st.just("allocate_beyond"), st.integers(0, 40 * GRAIN_BYTES)),
        st.tuples(st.sampled_from(["hold", "release"]), st.integers(0, 30), st.sampled_from(PEERS)),
        st.tuples(st.just("release_owner"), st.integers(0, 30)),
        st.tuples(st.just("drop_peer"), st.sampled_from(PEERS)),
        st.tuples(st.just("trim"), st.integers(0, 64) | st.just(0)),
    ),
    max_size=60,
)


@dataclass
class Expected:
    """A region as the oracle knows it."""

    region: Region
    colour: int
    owned: bool = True
    holds: list[str] = field(default_factory=list)

    def check(self) -> None:
        assert bytes(self.region.bytes) == bytes([self.colour]) * self.region.nbytes


@dataclass
class Oracle:
    arena: Arena
    limit_bytes: int
    alive: list[Expected] = field(default_factory=list)
    generations: set[int] = field(default_factory=set)
    retired: list[int] = field(default_factory=list)
    allocated: int = 0
    beyond: bool = False

    def allocate(self, nbytes: int) -> None:
        if -(-(nbytes + HEADER_BYTES) // GRAIN_BYTES) * GRAIN_BYTES > self.limit_bytes:
            return
        region = self.arena.allocate(nbytes)
        if region is None:
            assert self.alive, "an empty arena has room for whatever can ever fit"
        else:
            self.note(region)

    def allocate_beyond(self, nbytes: int) -> None:
        if -(-(nbytes + HEADER_BYTES) // GRAIN_BYTES) * GRAIN_BYTES > self.limit_bytes:
            return
        try:
            self.beyond = True
            region = self.arena.allocate(nbytes, "user", beyond=True)
        except CollectiveError:
            assert self.alive, "an empty arena has room for whatever can ever fit"
            return
        if region is None:
            assert any(not expected.owned for expected in self.alive)
        else:
            self.note(region)

    def note(self, region: Region) -> None:
        assert region.generation not in self.generations
        self.generations.add(region.generation)
        self.allocated += 1
        colour = self.allocated % 255 + 1
        region.tensor.fill_(colour)
        self.alive.append(Expected(region=region, colour=colour))

    def hold(self, index: int, peer: str) -> None:
        owned = [expected for expected in self.alive if expected.owned]
        if owned:
            expected = owned[index % len(owned)]
            self.arena.hold(expected.region, peer)
            expected.holds.append(peer)

    def release(self, index: int, peer: str) -> None:
        held = [expected for expected in self.alive if peer in expected.holds]
        if held:
            expected = held[index % len(held)]
            self.arena.release(expected.region, peer)
            expected.holds.remove(peer)

    def release_owner(self, index: int) -> None:
        owned = [expected for expected in self.alive if expected.owned]
        if owned:
            expected = owned[index % len(owned)]
            self.arena.release_owner(expected.region)
            expected.owned = False

    def drop_peer(self, peer: str) -> None:
        self.arena.drop_peer(peer)
        for expected in self.alive:
            expected.holds = [holder for holder in expected.holds if holder != peer]

    def trim(self, keep_grains: int) -> None:
        self.arena.trim(keep_grains * GRAIN_BYTES)

    def check(self) -> None:
        for expected in [expected for expected in self.alive if not expected.owned and not expected.holds]:
            assert self.arena.find(expected.region.generation) is None
            self.alive.remove(expected)
        for expected in self.alive:
            assert self.arena.find(expected.region.generation) is expected.region
            assert expected.region.segment not in self.retired
            expected.check()
        if self.arena.segment_bytes > self.limit_bytes:
            assert self.beyond
            assert self.arena.segment_bytes <= HARD * self.limit_bytes
        self.arena.validate()


@given(limit_grains=st.integers(1, 64) | st.integers(256, 1100), steps=STEPS)
@settings(max_examples=150, deadline=None)
def test_regions_never_overlap_and_everything_comes_back(limit_grains: int, steps: list[tuple[object, ...]]) -> None:
    retired: list[int] = []
    arena = Arena(limit_grains * GRAIN_BYTES, retired.append, hard_limit_bytes=HARD * limit_grains * GRAIN_BYTES)
    oracle = Oracle(arena=arena, limit_bytes=limit_grains * GRAIN_BYTES, retired=retired)
    for name, *arguments in steps:
        getattr(oracle, str(name))(*arguments)
        oracle.check()
    for peer in PEERS:
        oracle.drop_peer(peer)
    for expected in oracle.alive:
        if expected.owned:
            arena.release_owner(expected.region)
    assert arena.used_bytes == 0
    assert arena.segment_bytes <= oracle.limit_bytes
    arena.validate()
    arena.trim()
    assert arena.segment_bytes == 0
    assert len(retired) == len(set(retired))
    arena.close()


@given(data=st.data(), size=st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_free_space_is_what_was_not_taken(data: st.DataObject, size: int) -> None:
    free, taken = FreeSpace(size), [False] * size
    pieces: list[tuple[int, int]] = []
    for count in range(data.draw(st.integers(0, 30))):
        extents = list(free)
        if pieces and (not extents or data.draw(st.booleans())):
            start, stop = pieces.pop(data.draw(st.integers(0, len(pieces) - 1)))
            free.give(start, stop, count + 1)
            assert free.freed_at == count + 1
        else:
            extent = data.draw(st.sampled_from(extents))
            start, stop = extent.start, data.draw(st.integers(extent.start + 1, extent.stop))
            free.take(start, stop)
            pieces.append((start, stop))
        taken[start:stop] = [(start, stop) in pieces] * (stop - start)
        free.validate()
        covered = [not any(extent.start <= i < extent.stop for extent in free) for i in range(size)]
        assert covered == taken
        assert free.is_whole() is not any(taken)
        assert free.free_bytes == taken.count(False)
