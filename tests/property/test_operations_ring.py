"""The rings of operations and transfers against plain dictionaries; records torn in every way; arbitrary bytes."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_run.runtime.edge import operations_layout as layout
from elastic_run.runtime.edge.operations import UNDER_WAY, OperationRecord, Operations, read_operations
from elastic_run.runtime.edge.operations_codes import Kind, State
from elastic_run.runtime.edge.operations_layout import (
    OPERATION_BYTES,
    OPERATION_RECORDS,
    OPERATIONS_BYTE,
    TRANSFER_BYTES,
    TRANSFER_RECORDS,
    TRANSFERS_BYTE,
)
from elastic_run.runtime.edge.operations_writer import DROPPED, OperationsWriter

PIECE_BYTES = 4
NUMBERS = st.integers(0, 2**64 - 1)
ENDS = st.sampled_from([State.DONE, State.ABORTED, State.FAILED])


def blank() -> memoryview:
    memory = bytearray(layout.SECTION_BYTES)
    memory[: len(layout.table_bytes())] = layout.table_bytes()
    return memoryview(memory)


def read(section: memoryview, after: int = 0) -> Operations:
    return read_operations(section, "memory", after=after)


def begin(writer: OperationsWriter, nbytes: int = 0) -> int:
    return writer.begin(Kind.ALL_REDUCE, group=1, view=1, sequence=1, enter_ns=5, members=2, nbytes=nbytes)


def move(writer: OperationsWriter, operation: int, sent_bytes: int, record: int = 0) -> int:
    return writer.transfer(
        operation,
        3,
        sent_bytes=sent_bytes,
        received_bytes=sent_bytes,
        send_blocked_ns=0,
        receive_blocked_ns=0,
        progress_ns=1,
        record=record,
    )


class Twin:
    """The writer, and what a reader should find: state and moved bytes by operation, sent bytes by transfer."""

    def __init__(self) -> None:
        self.section = blank()
        self.writer = OperationsWriter(self.section)
        self.open: list[int] = []
        self.ended: list[int] = []
        self.said: dict[int, tuple[State, int]] = {}
        self.moved: dict[int, tuple[int, int]] = {}
        self.records: dict[int, int] = {}
        self.dropped = 0

    def begin(self) -> None:
        number = begin(self.writer)
        if number == DROPPED:
            self.dropped += 1
            assert len(self.open) == OPERATION_RECORDS
            return
        self.open.append(number)
        self.said[number] = (State.STARTED, 0)

    def update(self, which: int, nbytes: int) -> None:
        if self.open:
            number = self.open[which % len(self.open)]
            self.writer.update(number, moved_bytes=nbytes)
            self.said[number] = (State.STARTED, nbytes)

    def finish(self, which: int, state: State) -> None:
        if self.open:
            number = self.open.pop(which % len(self.open))
            self.writer.finish(number, state, done_ns=9, moved_bytes=number)
            self.said[number] = (state, number)
            self.ended.append(number)

    def transfer(self, which: int, nbytes: int) -> None:
        if self.open:
            number = self.open[which % len(self.open)]
            record = move(self.writer, number, nbytes, self.records.get(number, 0))
            self.records[number] = record
            self.moved[record] = (number, nbytes)

    def burst(self, count: int) -> None:
        for i in range(count):
            self.begin()
            self.transfer(-1, i)
            self.finish(-1, State.DONE)

    def check(self) -> None:
        found = read(self.section)
        shown = {record.number: (record.state, record.moved_bytes) for record in found.operations}
        assert shown == {number: self.said[number] for number in shown}
        assert {record.number for record in found.under_way()} == set(self.open)
        assert len(shown) == min(len(self.said), OPERATION_RECORDS)
        assert (found.operations_begun, found.operations_dropped) == (len(self.said), self.dropped)
        newest = max(self.moved, default=0)
        assert {r.number: (r.operation, r.sent_bytes) for r in found.transfers} == {
            number: said for number, said in self.moved.items() if number > newest - TRANSFER_RECORDS
        }
        assert (found.operations_torn, found.transfers_torn) == (0, 0)
        half = len(self.said) // 2
        later = read(self.section, after=half)
        assert later.operations == tuple(r for r in found.operations if r.number > half or r.state in UNDER_WAY)


SMALL = st.integers(0, 2**40)
STEPS = st.one_of(
    st.just(lambda twin: twin.begin()),
    st.builds(lambda which, nbytes: lambda twin: twin.update(which, nbytes), SMALL, SMALL),
    st.builds(lambda which, state: lambda twin: twin.finish(which, state), SMALL, ENDS),
    st.builds(lambda which, nbytes: lambda twin: twin.transfer(which, nbytes), SMALL, SMALL),
    st.builds(lambda count: lambda twin: twin.burst(count), st.integers(1, OPERATION_RECORDS + 50)),
    st.builds(lambda count: lambda twin: [twin.begin() for _ in range(count)], st.integers(1, OPERATION_RECORDS)),
)


@given(steps=st.lists(STEPS, max_size=25))
@settings(max_examples=20, deadline=None)
def test_rings_hold_the_newest_and_everything_under_way(steps: list[Callable[[Twin], None]]) -> None:
    twin = Twin()
    for step in steps:
        step(twin)
    twin.check()


def torn(old: bytes, new: bytes, arrived: int) -> bytes:
    """Bytes of which some four-byte pieces are new already."""
    pieces = range(0, len(old), PIECE_BYTES)
    return b"".join((new if arrived >> i & 1 else old)[at : at + PIECE_BYTES] for i, at in enumerate(pieces))


@given(
    first=st.tuples(SMALL, ENDS, NUMBERS),
    second=st.tuples(SMALL, st.none() | ENDS, NUMBERS),
    arrived=st.integers(0, 2 ** (OPERATION_BYTES // PIECE_BYTES) - 1),
)
@settings(max_examples=100, deadline=None)
def test_no_mixture_of_an_old_and_a_new_operation_passes(
    first: tuple[int, State, int], second: tuple[int, State | None, int], arrived: int
) -> None:
    """Whatever has arrived of a slot's next operation: one of the two is shown, with its own progress or none."""
    section = blank()
    writer = OperationsWriter(section)
    shown: list[OperationRecord] = []
    images: list[bytes] = []
    for nbytes, state, moved in (first, second):
        writer._next_slot = 0
        number = begin(writer, nbytes)
        shown += read(section).operations
        if state is not None:
            writer.finish(number, state, done_ns=7, moved_bytes=moved)
            shown += read(section).operations
        images.append(bytes(section[OPERATIONS_BYTE : OPERATIONS_BYTE + OPERATION_BYTES]))
    section[OPERATIONS_BYTE : OPERATIONS_BYTE + OPERATION_BYTES] = torn(images[0], images[1], arrived)
    found = read(section)
    assert len(found.operations) + found.operations_torn == 1
    for record in found.operations:
        if record.state is State.UNKNOWN:
            assert any((record.number, record.bytes) == (said.number, said.bytes) for said in shown)
        else:
            assert record in shown


@given(
    old=st.tuples(SMALL, SMALL),
    new=st.tuples(SMALL, SMALL),
    arrived=st.integers(0, 2 ** (TRANSFER_BYTES // PIECE_BYTES) - 1),
)
@settings(max_examples=100, deadline=None)
def test_no_mixture_of_an_old_and_a_new_transfer_passes(
    old: tuple[int, int], new: tuple[int, int], arrived: int
) -> None:
    section = blank()
    writer = OperationsWriter(section)
    images = []
    record = 0
    for operation, sent_bytes in (old, new):
        record = move(writer, operation + 1, sent_bytes, record)
        images.append(bytes(section[TRANSFERS_BYTE : TRANSFERS_BYTE + TRANSFER_BYTES]))
    section[TRANSFERS_BYTE : TRANSFERS_BYTE + TRANSFER_BYTES] = torn(images[0], images[1], arrived)
    found = [(r.operation - 1, r.sent_bytes) for r in read(section).transfers]
    assert found in ([], [old], [new])


@given(pieces=st.lists(st.tuples(st.integers(layout.COUNTERS_BYTE, layout.SECTION_BYTES - 8), NUMBERS), max_size=60))
@settings(max_examples=30, deadline=None)
def test_arbitrary_bytes_are_read_without_an_error(pieces: list[tuple[int, int]]) -> None:
    section = blank()
    for at, value in pieces:
        section[at : at + 8] = value.to_bytes(8, sys.byteorder)
    found = read(section)
    assert (found.operations, found.transfers) == ((), ())
    assert found.operations_torn <= len(pieces) * 2


def test_whoever_reads_between_two_lines_of_the_writer_sees_a_state_that_was_written() -> None:
    """So does whoever reads after the writer was killed there."""
    section = blank()
    writer = OperationsWriter(section)
    work: list[Callable[[], Any]] = [
        lambda: begin(writer, 100),
        lambda: writer.update(1, moved_bytes=40),
        lambda: move(writer, 1, 40),
        lambda: move(writer, 1, 60, record=1),
        lambda: writer.finish(1, State.DONE, done_ns=8, moved_bytes=100),
    ]
    looks = 0
    seen: list[Operations] = []

    def look(frame: FrameType, event: str, _: object) -> Any:
        nonlocal looks
        if frame.f_code.co_filename.endswith("operations_writer.py"):
            looks += 1
            seen.append(_peek(section))
            return look
        return None

    for step in work:
        before = read(section)
        seen.clear()
        tracer = sys.gettrace()  # of a coverage run
        sys.settrace(look)
        try:
            step()
        finally:
            sys.settrace(tracer)
        after = read(section)
        for found in seen:
            unknown = [record.state for record in found.operations] == [State.UNKNOWN]
            assert unknown or found.operations in (before.operations, after.operations, ())
            assert found.transfers in (before.transfers, after.transfers, ())
    assert looks > 4 * len(work)
    assert [record.state for record in read(section).operations] == [State.DONE]


def _peek(section: memoryview) -> Operations:
    """Read without being traced."""
    tracer = sys.gettrace()
    sys.settrace(None)
    found = read(section)
    sys.settrace(tracer)
    return found
