"""Records of operations: what was written is read, what finds no room is counted, what is open stays."""

import re
import struct
from typing import Any

import pytest

from elastic_run.runtime.edge import operations_layout as layout
from elastic_run.runtime.edge.operations import OperationRecord, Operations, read_operations
from elastic_run.runtime.edge.operations_codes import Algorithm, Dtype, Kind, Reduction, State, dtype_code
from elastic_run.runtime.edge.operations_layout import (
    GROUP_ENTRIES,
    NAME_BYTES,
    OPERATION_RECORDS,
    PEER_ENTRIES,
    TRANSFER_RECORDS,
    UNNAMED,
)
from elastic_run.runtime.edge.operations_writer import DROPPED, OperationsWriter
from elastic_run.runtime.protocol.errors import CodecError


@pytest.fixture
def section() -> memoryview:
    memory = bytearray(layout.SECTION_BYTES)
    memory[: len(layout.table_bytes())] = layout.table_bytes()
    return memoryview(memory)


@pytest.fixture
def writer(section: memoryview) -> OperationsWriter:
    return OperationsWriter(section)


def read(section: memoryview, after: int = 0) -> Operations:
    return read_operations(section, "memory", after=after)


def begin(writer: OperationsWriter, sequence: int = 1, **fields: Any) -> int:
    return writer.begin(Kind.BARRIER, group=1, view=1, sequence=sequence, enter_ns=10, members=2, **fields)


def done(writer: OperationsWriter, operation: int) -> None:
    writer.finish(operation, State.DONE, done_ns=20)


def move(writer: OperationsWriter, operation: int, sent_bytes: int = 1, record: int = 0) -> int:
    return writer.transfer(
        operation,
        0,
        sent_bytes=sent_bytes,
        received_bytes=2,
        send_blocked_ns=3,
        receive_blocked_ns=4,
        progress_ns=5,
        record=record,
    )


def test_operation_is_visible_from_its_beginning_to_its_end(section: memoryview, writer: OperationsWriter) -> None:
    root, culprit = writer.peer("w-root"), writer.peer("w-dead")
    writer.group(7, "world")
    number = writer.begin(
        Kind.REDUCE,
        group=7,
        view=3,
        sequence=44,
        enter_ns=1000,
        members=4,
        nbytes=1 << 40,
        reduction=Reduction.AVG,
        dtype=Dtype.BFLOAT16,
        algorithm=Algorithm.TREE_EXACT,
        partner=root,
        tag=9,
    )
    (begun,) = read(section).under_way()
    assert (begun.number, begun.state, begun.first_sent_ns, begun.done_ns) == (number, State.STARTED, 0, 0)
    writer.update(number, first_sent_ns=1001, progress_ns=1002, moved_bytes=77)
    (moving,) = read(section).under_way()
    assert (moving.first_sent_ns, moving.first_received_ns, moving.moved_bytes) == (1001, 0, 77)
    times = {"first_sent_ns": 1001, "first_received_ns": 1003, "progress_ns": 1004, "moved_bytes": 99}
    writer.finish(number, State.ABORTED, done_ns=1005, culprit=culprit, **times)
    found = read(section)
    assert found.under_way() == ()
    assert found.operations == (
        OperationRecord(
            number=number,
            kind="reduce",
            reduction="avg",
            dtype="bfloat16",
            algorithm="tree_exact",
            state=State.ABORTED,
            bytes=1 << 40,
            group=7,
            members=4,
            view=3,
            sequence=44,
            partner=root,
            tag=9,
            enter_ns=1000,
            done_ns=1005,
            culprit=culprit,
            **times,
        ),
    )
    assert (found.peer_name(root), found.peer_name(culprit), found.group_name(7)) == ("w-root", "w-dead", "world")
    assert (found.peer_name(None), found.peer_name(5), found.group_name(8)) == ("", "peer 5", "group 8")


def test_an_operation_ends_once_and_an_ended_one_is_not_updated(section: memoryview, writer: OperationsWriter) -> None:
    number = begin(writer)
    done(writer, number)
    writer.finish(number, State.FAILED, done_ns=99)
    writer.update(number, moved_bytes=5)
    (record,) = read(section).operations
    assert (record.state, record.done_ns, record.moved_bytes) == (State.DONE, 20, 0)


def test_old_operations_are_overwritten_and_counted_but_never_one_under_way(
    section: memoryview, writer: OperationsWriter
) -> None:
    done(writer, begin(writer))
    hung = begin(writer)
    for _ in range(3 * OPERATION_RECORDS):
        done(writer, begin(writer))
    found = read(section)
    assert [record.number for record in found.under_way()] == [hung]
    assert len(found.operations) == OPERATION_RECORDS
    assert found.operations_begun == found.operations_overwritten + OPERATION_RECORDS == 3 * OPERATION_RECORDS + 2
    done(writer, hung)
    done(writer, begin(writer))
    assert read(section).under_way() == ()


def test_when_all_are_under_way_the_next_is_dropped_and_counted(section: memoryview, writer: OperationsWriter) -> None:
    numbers = [begin(writer) for _ in range(OPERATION_RECORDS)]
    assert begin(writer) == DROPPED
    writer.update(DROPPED, moved_bytes=1)
    done(writer, DROPPED)
    assert move(writer, DROPPED) == 0
    found = read(section)
    assert len(found.under_way()) == OPERATION_RECORDS
    assert (found.operations_dropped, found.transfers_dropped, found.transfers_written) == (1, 1, 0)
    done(writer, numbers[500])
    assert begin(writer) == OPERATION_RECORDS + 1
    assert begin(writer) == DROPPED


def test_transfer_is_updated_in_place_until_it_is_overwritten(section: memoryview, writer: OperationsWriter) -> None:
    hung = begin(writer)
    first = move(writer, hung)
    assert move(writer, hung, sent_bytes=50, record=first) == first
    (record,) = read(section).transfers
    assert (record.operation, record.sent_bytes, record.received_bytes) == (hung, 50, 2)
    assert (record.send_blocked_ns, record.receive_blocked_ns, record.progress_ns) == (3, 4, 5)
    other = begin(writer)
    for _ in range(TRANSFER_RECORDS - 1):
        move(writer, other)
    assert move(writer, hung, record=first) == first
    move(writer, other)
    assert move(writer, hung, record=first) == TRANSFER_RECORDS + 2
    found = read(section)
    assert (found.transfers_overwritten, len(found.transfers)) == (2, TRANSFER_RECORDS)
    assert [r.number for r in found.transfers if r.operation == hung] == [TRANSFER_RECORDS + 2]


def test_a_later_look_leaves_out_what_was_seen_but_not_what_is_under_way(
    section: memoryview, writer: OperationsWriter
) -> None:
    numbers = [begin(writer) for _ in range(6)]
    for number in numbers:
        move(writer, number)
        if number != numbers[1]:
            done(writer, number)
    found = read(section, after=numbers[3])
    assert [record.number for record in found.operations] == [numbers[1], *numbers[4:]]
    assert [record.operation for record in found.transfers] == [numbers[1], *numbers[4:]]


def test_peer_table_is_bounded_and_counts_who_found_no_room(section: memoryview, writer: OperationsWriter) -> None:
    assert [writer.peer(f"w{i}") for i in range(PEER_ENTRIES)] == list(range(PEER_ENTRIES))
    assert writer.peer("late") == writer.peer("later") == UNNAMED
    assert writer.peer("w3") == 3
    found = read(section)
    assert (len(found.peers), found.peers_unnamed, found.peer_name(UNNAMED)) == (PEER_ENTRIES, 2, "unnamed peer")


def test_newest_groups_are_named(section: memoryview, writer: OperationsWriter) -> None:
    for group in range(GROUP_ENTRIES + 2):
        writer.group(group, f"g{group}")
    writer.group(5, "g5")
    found = read(section)
    assert sorted(found.groups) == list(range(2, GROUP_ENTRIES + 2))
    writer.group(5, "renamed")
    assert read(section).group_name(5) == "renamed"
    for _ in range(3 * GROUP_ENTRIES):
        writer.group(1, "one")
        writer.group(2, "two")
    assert read(section).group_name(5) == "renamed"
    assert read(section).group_name(1) == "one"


@pytest.mark.parametrize("name", ["", "x" * NAME_BYTES, "x" * (NAME_BYTES - 1) + "ä", "\0\n", "\ud800"])
def test_names_are_cut_to_whole_letters(section: memoryview, writer: OperationsWriter, name: str) -> None:
    index = writer.peer(name)
    expected = name.encode(errors="replace")[:NAME_BYTES].decode(errors="ignore")
    assert read(section).peers[index] == expected


def test_disarmed_writer_leaves_the_section_alone(section: memoryview, writer: OperationsWriter) -> None:
    number = begin(writer)
    before = bytes(section)
    writer.disarm()
    done(writer, number)
    done(writer, begin(writer))
    move(writer, number)
    writer.peer("w")
    writer.group(1, "g")
    assert bytes(section) == before


def test_numbers_go_on_when_a_section_is_written_again(section: memoryview, writer: OperationsWriter) -> None:
    done(writer, begin(writer))
    writer.peer("first")
    again = OperationsWriter(section)
    assert (begin(again), again.peer("second")) == (2, 1)


def test_section_of_another_shape_is_refused(section: memoryview) -> None:
    with pytest.raises(CodecError, match="expected"):
        read(section[:-8])
    struct.pack_into("=Q", section, 8, 7)
    with pytest.raises(CodecError, match="table"):
        read(section)


def test_code_of_a_later_version_is_shown_as_it_is(section: memoryview, writer: OperationsWriter) -> None:
    writer.begin(200, group=1, view=1, sequence=1, enter_ns=1, members=1)  # type: ignore[arg-type]
    assert read(section).operations[0].kind == "code 200"


def test_every_dtype_torch_computes_with_has_a_code() -> None:
    torch = pytest.importorskip("torch")
    dtypes = {str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)}
    packed = re.compile(r"u?int[1-7]|q.*|bits.*")  # containers of smaller numbers: torch has no arithmetic for them
    assert {name for name in dtypes if dtype_code(name) is Dtype.OTHER} == set(filter(packed.fullmatch, dtypes))


def test_every_reduction_and_method_of_the_collectives_has_a_code() -> None:
    reduction = pytest.importorskip("elastic_run.collectives.reduction")
    selection = pytest.importorskip("elastic_run.collectives.selection")
    assert {member.name for member in reduction.Reduction} <= set(Reduction.__members__)
    assert {member.name for member in selection.Method} <= set(Algorithm.__members__)
