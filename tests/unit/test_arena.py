"""The arena: who holds which bytes; and what a reader accepts of a peer's segments."""

import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from elastic_run.collectives.arena import GRAIN_BYTES, REGIONS_MAX, Arena, Region
from elastic_run.collectives.errors import CollectiveError
from elastic_run.collectives.peer_segments import PeerSegments
from elastic_run.collectives.segment import HEADER_BYTES, SEALS_REQUIRED, SEGMENTS_MAX
from elastic_run.runtime.protocol.errors import CodecError, InvariantViolated

MIB = 1 << 20
LIMIT_BYTES = 16 * MIB


@pytest.fixture
def arena() -> Iterator[Arena]:
    found = Arena(LIMIT_BYTES)
    yield found
    found.validate()
    found.close()


@pytest.fixture
def reader() -> Iterator[PeerSegments]:
    found = PeerSegments(LIMIT_BYTES)
    yield found
    found.close()


def take(arena: Arena, nbytes: int) -> Region:
    region = arena.allocate(nbytes)
    assert region is not None
    return region


def announce(arena: Arena, reader: PeerSegments, region: Region, *, writable: bool = False) -> None:
    size_bytes = arena.size_of(region.segment)
    reader.add(region.segment, os.dup(arena.fd_of(region.segment)), size_bytes, writable=writable)


def memfd(size_bytes: int, seals: int) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size_bytes)
    os.pwrite(fd, b"\1", 8)  # not retired
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("elastic-collectives")


@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 65, 4032, 4096, MIB, 5 * MIB])
def test_region_is_aligned_and_of_the_asked_size(arena: Arena, nbytes: int) -> None:
    region = take(arena, nbytes)
    assert region.offset % 64 == 0 and region.offset >= HEADER_BYTES
    assert (region.nbytes, region.tensor.numel(), len(region.bytes)) == (nbytes, nbytes, nbytes)
    if nbytes:
        assert region.tensor.data_ptr() % 64 == 0
        region.tensor.fill_(7)
        assert bytes(region.bytes) == b"\7" * nbytes
        region.bytes[0] = 9
        assert region.tensor[0].item() == 9


def test_tensor_of_a_power_of_two_takes_a_segment_hardly_larger(arena: Arena) -> None:
    region = take(arena, 8 * MIB)
    assert 8 * MIB < arena.size_of(region.segment) < 9 * MIB


def test_full_arena_says_none_until_something_is_released(arena: Arena) -> None:
    first = take(arena, 9 * MIB)
    assert arena.allocate(9 * MIB) is None
    arena.release_owner(first)
    assert take(arena, 9 * MIB).generation != first.generation


@pytest.mark.parametrize("nbytes", [LIMIT_BYTES, LIMIT_BYTES - HEADER_BYTES + 1, 1 << 60])
def test_what_never_fits_is_an_error_not_a_wait(arena: Arena, nbytes: int) -> None:
    with pytest.raises(ValueError, match="never fit"):
        arena.allocate(nbytes)


def test_negative_size_is_refused(arena: Arena) -> None:
    with pytest.raises(ValueError, match="-1 bytes"):
        arena.allocate(-1)


def test_largest_possible_region_fits_after_many_small_ones(arena: Arena) -> None:
    small = [take(arena, MIB // 2) for _ in range(25)]
    for region in small[::2] + small[1::2]:
        arena.release_owner(region)
    assert take(arena, LIMIT_BYTES - HEADER_BYTES).nbytes == LIMIT_BYTES - HEADER_BYTES


def test_free_neighbours_join(arena: Arena) -> None:
    regions = [take(arena, MIB // 4) for _ in range(3)]
    before = arena.segment_bytes
    assert {region.segment for region in regions} == {1}
    for position in (0, 2, 1):
        arena.release_owner(regions[position])
    assert take(arena, 3 * MIB // 4).offset == HEADER_BYTES
    assert arena.segment_bytes == before


def test_memory_freed_last_is_used_first(arena: Arena) -> None:
    regions = [take(arena, MIB // 8) for _ in range(6)]
    for position in (0, 4, 2):
        arena.release_owner(regions[position])
    assert [take(arena, MIB // 8).offset for _ in range(3)] == [regions[position].offset for position in (2, 4, 0)]


def test_used_memory_is_preferred_to_memory_never_touched(arena: Arena) -> None:
    large = take(arena, 3 * MIB)
    take(arena, MIB // 4)
    arena.release_owner(large)
    assert take(arena, MIB).offset == large.offset


def test_few_segments_serve_many_regions() -> None:
    arena = Arena(64 * MIB)
    segments = set()
    while (region := arena.allocate(MIB // 2)) is not None:
        segments.add(region.segment)
    assert arena.segment_bytes == 64 * MIB
    assert len(segments) == 7
    arena.close()


def test_number_of_segments_is_bounded(monkeypatch: pytest.MonkeyPatch, arena: Arena) -> None:
    """At the bound a free segment makes way for a new one; while none is free, the caller waits."""
    monkeypatch.setattr("elastic_run.collectives.arena.SEGMENTS_MAX", 2)
    small, large = take(arena, MIB), take(arena, 2 * MIB)
    assert arena.allocate(4 * MIB) is None
    arena.release_owner(small)
    assert take(arena, 4 * MIB).segment == 3
    assert arena.size_of(large.segment) > 2 * MIB


def test_number_of_regions_is_bounded() -> None:
    arena = Arena(4 * REGIONS_MAX * GRAIN_BYTES)
    regions = [take(arena, 0) for _ in range(REGIONS_MAX)]
    assert arena.allocate(0) is None
    arena.release_owner(regions[7])
    assert take(arena, 0).offset == regions[7].offset
    arena.close()


@pytest.mark.parametrize("position", range(4))
def test_region_is_free_when_owner_and_peers_are_done(arena: Arena, position: int) -> None:
    """In whatever order they finish; a region told to a peer twice is released by it twice."""
    region = take(arena, MIB)
    order = ["w1", "w2", "w1"]
    for peer in order:
        arena.hold(region, peer)
    order.insert(position, "owner")
    for name in order:
        assert arena.find(region.generation) is region
        if name == "owner":
            arena.release_owner(region)
        else:
            arena.release(region, name)
    assert arena.find(region.generation) is None
    assert arena.used_bytes == 0


def test_dropped_peer_releases_all_it_held_and_nothing_else(arena: Arena) -> None:
    regions = [take(arena, 100) for _ in range(3)]
    for region in regions:
        arena.hold(region, "dead")
        arena.hold(region, "dead")
    arena.hold(regions[1], "alive")
    arena.release_owner(regions[0])
    arena.release_owner(regions[1])
    arena.drop_peer("dead")
    assert [arena.find(region.generation) is None for region in regions] == [True, False, False]
    arena.release(regions[1], "alive")
    arena.release_owner(regions[2])
    assert arena.used_bytes == 0
    arena.drop_peer("dead")


def test_release_of_what_a_peer_does_not_hold_is_the_peers_fault(arena: Arena) -> None:
    region = take(arena, 10)
    arena.hold(region, "w1")
    with pytest.raises(CodecError, match="w2 releases region"):
        arena.release(region, "w2")
    arena.release(region, "w1")
    with pytest.raises(CodecError, match="does not hold"):
        arena.release(region, "w1")
    arena.release_owner(region)
    with pytest.raises(CodecError, match="does not hold"):
        arena.release(region, "w1")


def test_own_mistakes_are_violated_invariants(arena: Arena) -> None:
    region = take(arena, 10)
    arena.hold(region, "w1")
    arena.release_owner(region)
    with pytest.raises(InvariantViolated, match="released twice"):
        arena.release_owner(region)
    with pytest.raises(InvariantViolated, match="offered to w2"):
        arena.hold(region, "w2")
    with pytest.raises(InvariantViolated, match="no segment 9"):
        arena.fd_of(9)
    closed = Arena(MIB)
    closed.close()
    with pytest.raises(InvariantViolated, match="closed"):
        closed.allocate(1)


def test_small_free_segments_make_room_for_a_large_region() -> None:
    retired: list[int] = []
    arena = Arena(8 * MIB, retired.append)
    regions = [take(arena, MIB), take(arena, 2 * MIB), take(arena, 100)]
    arena.release_owner(regions[0])
    assert arena.allocate(7 * MIB) is None
    assert retired == []
    arena.release_owner(regions[1])
    arena.release_owner(regions[2])
    assert take(arena, 7 * MIB + MIB // 2).nbytes == 7 * MIB + MIB // 2
    assert retired and arena.segment_bytes <= 8 * MIB
    arena.validate()
    arena.close()


def test_trim_gives_back_the_coldest_free_segments_down_to_what_is_kept() -> None:
    retired: list[int] = []
    arena = Arena(64 * MIB, retired.append)
    regions = [take(arena, nbytes) for nbytes in (MIB, 4 * MIB, 16 * MIB)]
    assert [region.segment for region in regions] == [1, 2, 3]
    for position in (2, 0):
        arena.release_owner(regions[position])
    assert arena.trim(keep_bytes=2 * MIB) > 16 * MIB
    assert retired == [3]
    assert arena.trim(keep_bytes=2 * MIB) == 0
    assert arena.trim() > MIB
    assert retired == [3, 1]
    assert arena.segment_bytes == arena.size_of(2)
    arena.close()


def test_trimmed_memory_is_the_systems_again_though_a_peer_still_maps_it(arena: Arena, reader: PeerSegments) -> None:
    region = take(arena, 4 * MIB)
    region.tensor.fill_(1)
    announce(arena, reader, region)
    kept = reader.view(region.segment, region.offset, region.nbytes)
    fd = os.dup(arena.fd_of(region.segment))
    assert os.fstat(fd).st_blocks * 512 >= 4 * MIB
    arena.release_owner(region)
    arena.trim()
    assert os.fstat(fd).st_blocks == 0
    assert kept.max().item() == 0
    assert not reader.check(region.segment, region.offset, region.generation)
    os.close(fd)


def test_retired_segments_are_dropped_by_a_reader_that_nobody_told(arena: Arena, reader: PeerSegments) -> None:
    """Else a reader with the owner's limit would run out of it, when the owner makes new segments for old ones."""
    for nbytes in (9 * MIB, 10 * MIB, 11 * MIB):
        region = take(arena, nbytes)
        announce(arena, reader, region)
        assert reader.view(region.segment, region.offset, nbytes).numel() == nbytes
        arena.release_owner(region)
        arena.trim()
    with pytest.raises(CodecError, match="was dropped"):
        reader.view(1, HEADER_BYTES, 1)


def test_segment_is_sealed_against_any_change_of_its_size(arena: Arena) -> None:
    region = take(arena, 1)
    for size_bytes in (0, 1 << 30):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd_of(region.segment), size_bytes)
    assert not os.get_inheritable(arena.fd_of(region.segment))


def test_pages_of_a_region_exist_when_it_is_handed_out(arena: Arena) -> None:
    """Only those: the rest of the segment takes no memory yet."""
    region = take(arena, 3 * MIB)
    allocated_bytes = os.fstat(arena.fd_of(region.segment)).st_blocks * 512
    assert region.offset + region.nbytes <= allocated_bytes < arena.size_of(region.segment)


def test_tensors_outlive_arena_and_reader_and_then_nothing_is_mapped() -> None:
    before = (descriptors(), mappings())
    arena, reader = Arena(LIMIT_BYTES), PeerSegments(LIMIT_BYTES)
    region = take(arena, MIB)
    region.tensor.fill_(3)
    announce(arena, reader, region)
    assert descriptors() == before[0] + 1, "a mapping holds no descriptor"
    seen = reader.view(region.segment, region.offset, region.nbytes)
    arena.close()
    arena.close()
    reader.close()
    assert descriptors() == before[0]
    assert int(seen.sum()) == int(region.tensor.sum()) == 3 * MIB
    assert mappings() == before[1] + 2
    del arena, reader, region, seen
    assert mappings() == before[1]


def test_reader_sees_what_the_owner_writes_later(arena: Arena, reader: PeerSegments) -> None:
    region = take(arena, 4 * MIB)
    announce(arena, reader, region)
    seen = reader.view(region.segment, region.offset, region.nbytes)
    for value in (1, 2):
        region.tensor.fill_(value)
        assert torch.equal(seen, region.tensor)


def test_stalled_reader_notices_that_the_memory_was_given_away(arena: Arena, reader: PeerSegments) -> None:
    first, second = take(arena, 1000), take(arena, 1000)
    announce(arena, reader, first)
    place = (second.segment, second.offset)
    assert reader.check(*place, second.generation)
    arena.hold(second, "stalled")
    arena.release_owner(first)
    arena.release_owner(second)
    assert reader.check(*place, second.generation)
    arena.drop_peer("stalled")
    assert not reader.check(*place, second.generation)
    assert not reader.check(*place, 0)
    other = take(arena, 100_000)
    assert other.offset <= second.offset < other.offset + other.nbytes
    other.tensor.fill_(0xFF)
    assert not reader.check(*place, second.generation)


def test_writable_mapping_is_written_through(arena: Arena, reader: PeerSegments) -> None:
    region = take(arena, 256)
    announce(arena, reader, region, writable=True)
    reader.view(region.segment, region.offset, 256).view(torch.float32).fill_(1.5)
    assert torch.equal(region.tensor.view(torch.float32), torch.full((64,), 1.5))


def test_places_outside_a_segment_are_refused(arena: Arena, reader: PeerSegments) -> None:
    region = take(arena, 1000)
    announce(arena, reader, region)
    size_bytes = arena.size_of(1)
    assert reader.view(1, size_bytes, 0).numel() == 0
    assert reader.view(1, 64, size_bytes - 64).numel() == size_bytes - 64
    for offset, nbytes in [
        (0, 10),
        (-64, 10),
        (65, 10),
        (size_bytes - 64, 65),
        (size_bytes + 64, 0),
        (64, -1),
        (64, 1 << 63),
        (1 << 63, 1),
    ]:
        with pytest.raises(CodecError, match="can be at byte"):
            reader.view(1, offset, nbytes)
    with pytest.raises(CodecError, match="can be at byte"):
        reader.check(1, size_bytes + 64, 5)
    with pytest.raises(CodecError, match="never announced"):
        reader.view(2, 64, 1)
    reader.drop(1)
    reader.drop(1)
    with pytest.raises(CodecError, match="was dropped"):
        reader.view(1, 64, 1)
    assert not reader.check(1, region.offset, region.generation)


def test_unfit_descriptors_are_refused_and_closed(reader: PeerSegments, tmp_path: Path) -> None:
    before = descriptors()
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(file, MIB)
    sockets = socket.socketpair()
    with pytest.raises(CodecError, match="not a memfd"):
        reader.add(1, file, MIB)
    with pytest.raises(CodecError, match="not a memfd"):
        reader.add(1, sockets[0].detach(), MIB)
    sockets[1].close()
    for seals in (0, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW):
        with pytest.raises(CodecError, match="can change its size"):
            reader.add(1, memfd(MIB, seals), MIB)
    with pytest.raises(CodecError, match="has 1048576 bytes, announced were 2097152"):
        reader.add(1, memfd(MIB, SEALS_REQUIRED), 2 * MIB)
    for size_bytes in (0, -1, LIMIT_BYTES + 1, 1 << 63):
        with pytest.raises(CodecError, match="allowed are"):
            reader.add(1, memfd(MIB, SEALS_REQUIRED), size_bytes)
    assert descriptors() == before


def test_segment_that_may_not_be_written_is_not_mapped_writable(reader: PeerSegments) -> None:
    fd = memfd(MIB, SEALS_REQUIRED)
    read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    with pytest.raises(CodecError, match="does not allow writing"):
        reader.add(1, read_only, MIB, writable=True)
    reader.add(1, fd, MIB)


def test_segments_of_a_peer_are_bounded(reader: PeerSegments) -> None:
    reader.add(1, memfd(LIMIT_BYTES // 2, SEALS_REQUIRED), LIMIT_BYTES // 2)
    with pytest.raises(CodecError, match="announced twice"):
        reader.add(1, memfd(4096, SEALS_REQUIRED), 4096)
    with pytest.raises(CodecError, match="allowed are"):
        reader.add(2, memfd(LIMIT_BYTES, SEALS_REQUIRED), LIMIT_BYTES)
    for number in range(2, SEGMENTS_MAX + 1):
        reader.add(number, memfd(4096, SEALS_REQUIRED), 4096)
    with pytest.raises(CodecError, match="allowed are 64"):
        reader.add(1000, memfd(4096, SEALS_REQUIRED), 4096)
    reader.drop(1)
    reader.add(1001, memfd(LIMIT_BYTES // 2, SEALS_REQUIRED), LIMIT_BYTES // 2)


def test_what_a_peer_still_reads_stays_as_it_is_when_its_owner_leaves(arena: Arena, reader: PeerSegments) -> None:
    region = take(arena, 1000)
    region.tensor.fill_(7)
    announce(arena, reader, region)
    arena.hold(region, "slow")
    arena.release_owner(region)
    arena.leave()
    arena.drop_peer("slow")
    arena.close()
    assert torch.equal(reader.view(region.segment, region.offset, 1000), torch.full((1000,), 7, dtype=torch.uint8))
    assert reader.check(region.segment, region.offset, region.generation)


def test_segments_too_small_or_with_huge_pages_are_refused(reader: PeerSegments) -> None:
    with pytest.raises(CodecError, match="hold no region"):
        reader.add(1, memfd(8, SEALS_REQUIRED), 8)
    huge = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | os.MFD_HUGETLB)
    os.ftruncate(huge, 4 << 20)
    fcntl.fcntl(huge, fcntl.F_ADD_SEALS, SEALS_REQUIRED)
    with pytest.raises(CodecError, match="huge pages"):
        reader.add(1, huge, 4 << 20)


def test_who_must_not_wait_gets_memory_beyond_the_limit_up_to_the_hard_one() -> None:
    retired: list[int] = []
    arena = Arena(4 * MIB, retired.append, hard_limit_bytes=10 * MIB)
    first = take(arena, 3 * MIB)
    assert arena.allocate(3 * MIB) is None
    extra = arena.allocate(3 * MIB, beyond=True)
    assert extra is not None
    assert arena.segment_bytes > 4 * MIB
    with pytest.raises(CollectiveError, match="peers map no more"):
        arena.allocate(4 * MIB - GRAIN_BYTES, beyond=True)
    arena.validate()
    arena.release_owner(extra)
    assert retired == [extra.segment]
    assert arena.segment_bytes <= 4 * MIB
    assert arena.find(first.generation) is first
    arena.close()


def test_memory_beyond_the_limit_is_for_nobody_else() -> None:
    arena = Arena(4 * MIB, hard_limit_bytes=16 * MIB)
    regions = [take(arena, 3 * MIB), arena.allocate(2 * MIB + MIB // 2, beyond=True)]
    assert all(regions)
    assert arena.segment_bytes - arena.used_bytes > MIB // 2
    assert arena.allocate(MIB // 2) is None
    arena.release_owner(regions[0])
    assert arena.allocate(MIB // 2) is not None
    arena.close()


def test_whoever_gave_up_what_is_still_read_has_to_wait() -> None:
    arena = Arena(4 * MIB, hard_limit_bytes=16 * MIB)
    region = arena.allocate(3 * MIB, "one")
    assert region is not None
    arena.hold(region, "reader")
    arena.release_owner(region)
    assert arena.allocate(3 * MIB, "one", beyond=True) is None
    assert arena.allocate(3 * MIB, "two", beyond=True) is not None
    arena.release(region, "reader")
    assert arena.allocate(3 * MIB, "one", beyond=True) is not None
    arena.close()
