"""The compiled pipeline, driven by threads in place of processes: its bits, its slots, its way back."""

import os
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_run.collectives import native
from elastic_run.collectives.algorithms.arithmetic import reduce_parts
from elastic_run.collectives.algorithms.flows import DONE, PAUSED, in_turn, packed
from elastic_run.collectives.algorithms.streamed import ALIGN_BYTES, CONTROL_BYTES, STALE
from elastic_run.collectives.exact import Step
from elastic_run.collectives.reduction import Reduction

kernels = native.kernels
pytestmark = pytest.mark.skipif(kernels is None, reason="the kernels are not built here: no compiler")
TURNS_MAX = 100_000


@pytest.fixture(scope="module")
def quiet_fd() -> Iterator[int]:
    """Something that is never readable."""
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


class Member:
    """Its region, with the word before it, and its tensors."""

    def __init__(self, region_bytes: int, value: torch.Tensor, *, in_place: bool) -> None:
        memory = torch.randint(0, 256, (region_bytes + 3 * ALIGN_BYTES,), dtype=torch.uint8)
        start = -memory.data_ptr() % ALIGN_BYTES + ALIGN_BYTES
        self.memory = memory
        self.generation = memory[start - ALIGN_BYTES : start - ALIGN_BYTES + 8].view(torch.int64)
        self.generation.fill_(77)
        self.region = memory[start : start + region_bytes]
        self.beyond = memory[start + region_bytes :].clone(), memory[start + region_bytes :]
        self.given = value.clone()
        self.source = value.clone()
        self.target = self.source if in_place else torch.zeros_like(value)
        self.undo = torch.empty(value.nbytes + 64, dtype=torch.uint8)
        self.in_place = in_place


def crowd(
    values: list[torch.Tensor], chunk: int, slots: int, steps: bytes, divisor: float, *, in_place: bool, header: int = 0
) -> tuple[list[Member], list[object]]:
    assert kernels is not None
    size = len(values)
    share = (chunk // size // ALIGN_BYTES + 2) * ALIGN_BYTES
    region_bytes = CONTROL_BYTES + header + slots * (chunk + share)
    members = [Member(region_bytes, value, in_place=in_place) for value in values]
    for member in members:
        kernels.prepare(member.region.data_ptr())
    regions = tuple((member.region.data_ptr(), 77) for member in members)
    streams = [
        kernels.stream(
            rank,
            regions,
            member.source.data_ptr(),
            member.target.data_ptr(),
            (member.undo.data_ptr() + 15) // 16 * 16 if in_place else 0,
            member.source.nbytes,
            native.TYPES[member.source.dtype],
            chunk,
            slots,
            header,
            steps,
            divisor,
        )
        for rank, member in enumerate(members)
    ]
    return members, streams


def finish(streams: list[object], fd: int, limit_ns: int = 1_000_000) -> list[int]:
    """Drive each stream in a thread of its own."""
    assert kernels is not None
    states = [PAUSED] * len(streams)

    def drive(rank: int) -> None:
        for _ in range(TURNS_MAX):
            states[rank] = kernels.advance(streams[rank], fd, limit_ns)
            if states[rank] != PAUSED:
                return

    threads = [threading.Thread(target=drive, args=(rank,)) for rank in range(len(streams))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return states


def drawn(dtype: torch.dtype, size: int, numel: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return list(torch.randn((size, numel), generator=generator).to(dtype))
    info = torch.iinfo(dtype)
    return list(torch.randint(info.min, info.max, (size, numel), dtype=dtype, generator=generator))


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@settings(deadline=None, max_examples=80)
@given(
    dtype=st.sampled_from(sorted(native.TYPES, key=str)),
    size=st.integers(2, 7),
    numel=st.integers(1, 6000),
    lines=st.integers(1, 40),
    slots=st.integers(2, 5),
    header=st.sampled_from([0, 64, 640]),
    data=st.data(),
)
def test_bits_are_those_of_the_other_algorithms(
    quiet_fd: int, dtype: torch.dtype, size: int, data: st.DataObject, **shape: int
) -> None:
    numel, lines, slots, header = (shape[name] for name in ("numel", "lines", "slots", "header"))
    in_place, average, seed = data.draw(st.booleans()), data.draw(st.booleans()), data.draw(st.integers(0, 1 << 30))
    values = drawn(dtype, size, numel, seed)
    reduction = Reduction.AVG if average and dtype.is_floating_point else Reduction.SUM
    divisor = float(size) if reduction is Reduction.AVG else 1.0
    members, streams = crowd(
        values, lines * ALIGN_BYTES, slots, in_turn(size), divisor, in_place=in_place, header=header
    )
    assert finish(streams, quiet_fd) == [DONE] * size
    expected = torch.empty_like(values[0])
    reduce_parts(expected, values, reduction)
    for member in members:
        assert same(member.target, expected)
        assert in_place or same(member.source, member.given), "what is not in place leaves its source alone"
        assert torch.equal(*member.beyond), "nothing is written behind the region"


@settings(deadline=None, max_examples=30)
@given(size=st.integers(2, 6), numel=st.integers(1, 3000), seed=st.integers(0, 1 << 30))
def test_steps_say_the_order_of_the_sum(quiet_fd: int, size: int, numel: int, seed: int) -> None:
    """From the last to the first, which rounds differently."""
    values = drawn(torch.float32, size, numel, seed)
    order = list(range(size - 1, -1, -1))
    steps = packed((Step(0, 0, 1), *(Step(0, ~0, part) for part in range(2, size))), tuple(order))
    members, streams = crowd(values, 512, 3, steps, 1.0, in_place=True)
    assert finish(streams, quiet_fd) == [DONE] * size
    expected = torch.empty_like(values[0])
    reduce_parts(expected, [values[rank] for rank in order], Reduction.SUM)
    assert all(same(member.target, expected) for member in members)


@settings(deadline=None, max_examples=40)
@given(
    size=st.integers(2, 5),
    numel=st.integers(500, 6000),
    turns=st.lists(st.integers(0, 4), max_size=40),
    seed=st.integers(0, 1 << 30),
)
def test_interrupted_anywhere_the_input_comes_back(
    quiet_fd: int, size: int, numel: int, turns: list[int], seed: int
) -> None:
    """Members get turns of no length, one chunk each; then all are interrupted."""
    assert kernels is not None
    values = drawn(torch.float32, size, numel, seed)
    members, streams = crowd(values, 256, 3, in_turn(size), 1.0, in_place=True)
    for turn in turns:
        kernels.advance(streams[turn % size], quiet_fd, 0)
    for member, stream in zip(members, streams, strict=True):
        kernels.restore(stream)
        assert same(member.source, member.given)


@pytest.mark.parametrize("after", [0, 1, 5, 30])
def test_memory_that_was_given_away_is_noticed(quiet_fd: int, after: int) -> None:
    assert kernels is not None
    members, streams = crowd(drawn(torch.float32, 3, 5000, 1), 256, 3, in_turn(3), 1.0, in_place=True)
    for turn in range(after):
        kernels.advance(streams[turn % 3], quiet_fd, 0)
    members[2].generation.fill_(78)
    members[2].region[:16].fill_(255)  # counts of somebody else
    for rank in (0, 1):
        assert kernels.advance(streams[rank], quiet_fd, 10**9) == STALE
        kernels.restore(streams[rank])
        assert same(members[rank].source, members[rank].given)


def test_something_readable_ends_the_slice() -> None:
    """A member that waits for another one must not wait on when its connections have news."""
    assert kernels is not None
    _, streams = crowd(drawn(torch.float32, 2, 5000, 1), 256, 3, in_turn(2), 1.0, in_place=True)
    fd = os.eventfd(1, os.EFD_CLOEXEC)
    try:
        assert kernels.advance(streams[0], fd, 3600 * 10**9) == PAUSED
    finally:
        os.close(fd)
    staged, taken, waited_ns, finished, blamed = kernels.progress(streams[0], 1)
    assert (staged, taken, finished, blamed) == (3 * 256, 0, 0, 1)
    assert waited_ns > 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"regions": ((0, 0),)},
        {"rank": 2},
        {"type": 9},
        {"chunk": 100},
        {"chunk": 0},
        {"slots": 1},
        {"nbytes": -4},
        {"nbytes": 6},
        {"undo": 8},
        {"header": -64},
        {"steps": b""},
        {"steps": packed((Step(0, 0, 2),))},
        {"steps": packed((Step(16, 0, 1),))},
        {"steps": packed((Step(0, ~16, 1),))},
    ],
)
def test_a_stream_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    assert kernels is not None
    regions = ((4096, 1), (8192, 1))
    arguments = {
        "rank": 0,
        "regions": regions,
        "source": 64,
        "target": 64,
        "undo": 0,
        "nbytes": 8,
        "type": 0,
        "chunk": 64,
        "slots": 2,
        "header": 0,
        "steps": in_turn(2),
        "divisor": 1.0,
    }
    with pytest.raises(ValueError, match="no such stream"):
        kernels.stream(*(arguments | wrong).values())  # type: ignore[arg-type]


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(2, 4),
    numel=st.integers(500, 4000),
    slots=st.integers(2, 4),
    counts=st.lists(st.tuples(st.integers(0, 12), st.integers(-3, 60)), min_size=1, max_size=12),
)
def test_whatever_a_member_counts_nothing_else_is_touched(
    quiet_fd: int, size: int, numel: int, slots: int, counts: list[tuple[int, int]]
) -> None:
    """Counts of all others are anything, and go back: as of a member that lies, or of memory that was given away."""
    assert kernels is not None
    members, streams = crowd(drawn(torch.float32, size, numel, 1), 256, slots, in_turn(size), 1.0, in_place=True)
    for turns, count in counts:
        for other in members[1:]:
            other.region[4:16].view(torch.int32).fill_(count)
        for _ in range(turns):
            kernels.advance(streams[0], quiet_fd, 0)
        blamed = kernels.progress(streams[0], 0)[4]
        assert 0 < blamed < size, "it waits for another member"
    kernels.restore(streams[0])
    assert same(members[0].source, members[0].given)
    assert torch.equal(*members[0].beyond)
