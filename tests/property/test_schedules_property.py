"""How operations are cut and who owns what: everything covered once, and the same for everybody."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic_run.collectives.algorithms.chunks import CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, Chunks, Saved, shares_of
from elastic_run.collectives.algorithms.hierarchical import Hosts
from elastic_run.collectives.scratch import GRAIN_BYTES, WASTE_MAX, ScratchPool

KIB = 1 << 10


@given(st.integers(0, 1 << 26), st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 64))
def test_chunks_cover_every_element_once_and_stay_within_their_bound(numel: int, itemsize: int, parts: int) -> None:
    chunks = Chunks(shares_of(numel, itemsize, parts), itemsize)
    everything = [chunk for share in range(parts) for chunk in chunks[share]]
    ends = [0, *(chunk.stop for chunk in everything)]
    assert [chunk.start for chunk in everything] == ends[:-1]
    assert ends[-1] == numel
    assert all(len(chunks[share]) == chunks.count for share in range(parts))
    # A chunk is longer than wanted by less than the alignment and what rounding spreads.
    assert chunks.longest * itemsize <= CHUNK_BYTES_MAX + 128
    if chunks.count > 1:
        assert chunks.longest * itemsize >= CHUNK_BYTES_MIN // 2


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, ...]:
    """Hosts by rank, numbered by first appearance."""
    names = draw(st.lists(st.integers(0, 5), min_size=1, max_size=24))
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return tuple(numbers[name] for name in names)


@given(layouts())
def test_every_slice_has_one_owner_on_each_host(layout: tuple[int, ...]) -> None:
    hosts = Hosts(layout)
    for host, members in enumerate(hosts.members):
        assert members
        owned = [number for rank in members for number in hosts.owned_by(host, rank)]
        assert sorted(owned) == list(range(hosts.slices))
        shares = [len(hosts.owned_by(host, rank)) for rank in members]
        assert max(shares) - min(shares) <= 1


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=8))
def test_what_was_saved_is_restored_whatever_was_written(places: list[tuple[int, int]]) -> None:
    data = torch.arange(100)
    before = data.clone()
    saved = Saved(data, torch.empty_like(data))
    covered: set[int] = set()
    for start, length in places:
        place = slice(start, start + length)
        if covered.isdisjoint(range(start, start + length)):  # an operation receives each element once
            covered.update(range(start, start + length))
            saved.save(place).fill_(-1)
    saved.restore()
    assert torch.equal(data, before)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4096 * KIB)), max_size=40), st.integers(0, 8192 * KIB))
def test_scratch_is_large_enough_never_shared_and_bounded(steps: list[tuple[bool, int]], limit_bytes: int) -> None:
    pool = ScratchPool(limit_bytes)
    held: list[torch.Tensor] = []
    for take, nbytes in steps:
        if take or not held:
            block = pool.take(nbytes)
            assert nbytes <= len(block) <= WASTE_MAX * max(nbytes, GRAIN_BYTES)
            assert all(block.data_ptr() != other.data_ptr() for other in held)
            held.append(block)
        else:
            pool.give(held.pop(nbytes % len(held)))
        assert pool.kept_bytes <= limit_bytes
    pool.clear()
    assert pool.kept_bytes == 0
