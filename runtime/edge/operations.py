"""Reads the operations section of a worker's telemetry file, while the worker runs, hangs, or after it died.

Invariants:
1. Every record returned was written as such; records and halves being written are counted, or said to be UNKNOWN
   (tests/property/test_operations_ring.py).
2. No content of the section raises anything but CodecError (same test).
Not here: what lies where (operations_layout.py), writing (operations_writer.py), the rest of the file (telemetry.py),
what the records mean for the health of a job (detection).
"""

import enum
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from elastic_run.runtime.edge import operations_layout as layout
from elastic_run.runtime.edge.operations_codes import Algorithm, Dtype, Kind, Reduction, State
from elastic_run.runtime.edge.operations_layout import (
    HALF_BYTES,
    NOBODY,
    OPERATION_BYTES,
    OPERATION_RECORDS,
    SEAL_BYTES,
    TRANSFER_BYTES,
    TRANSFER_RECORDS,
    UNNAMED,
    seal_of,
)
from elastic_run.runtime.protocol.errors import CodecError

READS_MAX = 3
"""A running worker is caught in the middle of a record now and then, hardly ever three times in a row."""
UNDER_WAY = (State.STARTED, State.UNKNOWN)

_STATES = frozenset(int(state) for state in State if state is not State.UNKNOWN)
_NEVER_WRITTEN = bytes(OPERATION_BYTES)
_NO_PROGRESS = (0, 0, 0, 0, 0, NOBODY)
_NUMBER_BYTE = layout.offset_of(layout.OPERATION, "number")
_DONE_BYTE = layout.offset_of(layout.PROGRESS, "done_ns")
_OPERATION_BYTE = layout.offset_of(layout.TRANSFER, "operation")


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationRecord:
    """One collective operation. Times are monotonic nanoseconds of the worker's host; 0: it has not happened."""

    number: int
    """In the order in which this worker entered them; 1 is the first."""
    kind: str
    reduction: str
    dtype: str
    algorithm: str
    state: State
    bytes: int
    group: int
    members: int
    view: int
    sequence: int
    """The operation's place in its group: equal on all members."""
    partner: int | None
    """Peer index of the root, or of the other side of a send or receive."""
    tag: int
    enter_ns: int
    first_sent_ns: int
    first_received_ns: int
    progress_ns: int
    """When a byte moved last."""
    done_ns: int
    moved_bytes: int
    culprit: int | None
    """Peer index of whoever is to blame for the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferRecord:
    """One operation's traffic with one peer."""

    number: int
    operation: int
    """Number of its operation, whose own record may be overwritten already."""
    peer: int
    sent_bytes: int
    received_bytes: int
    send_blocked_ns: int
    receive_blocked_ns: int
    progress_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Operations:
    """What the section said when it was read."""

    operations: tuple[OperationRecord, ...]
    """Oldest first."""
    transfers: tuple[TransferRecord, ...]
    peers: Mapping[int, str]
    groups: Mapping[int, str]
    operations_begun: int
    operations_overwritten: int
    operations_dropped: int
    operations_torn: int
    """Records that were being written: of a process killed there, or caught there."""
    transfers_written: int
    transfers_overwritten: int
    transfers_dropped: int
    transfers_torn: int
    peers_unnamed: int

    def under_way(self) -> tuple[OperationRecord, ...]:
        """The operations that were entered and are not known to have ended."""
        return tuple(record for record in self.operations if record.state in UNDER_WAY)

    def peer_name(self, index: int | None) -> str:
        """Return the worker's id; what stands for it when it has none, empty for nobody."""
        if index is None:
            return ""
        return "unnamed peer" if index == UNNAMED else self.peers.get(index, f"peer {index}")

    def group_name(self, group: int) -> str:
        return self.groups.get(group, f"group {group}")


def check_table(section: memoryview, where: str) -> None:
    """Raise CodecError unless `section` is as long as this layout's and begins with its table."""
    if section.nbytes != layout.SECTION_BYTES:
        raise CodecError(f"{where}: operations take {section.nbytes} bytes, expected {layout.SECTION_BYTES}")
    found = struct.unpack_from(f"={len(layout.TABLE)}Q", section)
    if found != layout.TABLE:
        raise CodecError(f"{where}: the table of its operations is {found}, expected {layout.TABLE}")


def read_operations(section: memoryview, where: str, *, after: int = 0) -> Operations:
    """Return what `section` holds now. Raises CodecError when it is no operations section.

    after: leave out operations up to this number unless they are under way, and their transfers. All of a full section
    take twenty milliseconds; for a look twice a second give the newest number seen before.
    """
    check_table(section, where)
    words = section.cast("Q")
    begun, written = words[layout.C_OPERATIONS], words[layout.C_TRANSFERS]
    operations, operations_torn = _operations(section, words, after)
    wanted = {record.number for record in operations}
    transfers, transfers_torn = _transfers(section, words, after, wanted)
    return Operations(
        operations=operations,
        transfers=transfers,
        peers=_names(section, layout.PEERS_BYTE, layout.PEER_ENTRIES, words[layout.C_PEERS]),
        groups=_names(section, layout.GROUPS_BYTE, layout.GROUP_ENTRIES, words[layout.C_GROUPS]),
        operations_begun=begun,
        operations_overwritten=max(0, begun - OPERATION_RECORDS),
        operations_dropped=words[layout.C_OPERATIONS_DROPPED],
        operations_torn=operations_torn,
        transfers_written=written,
        transfers_overwritten=max(0, written - TRANSFER_RECORDS),
        transfers_dropped=words[layout.C_TRANSFERS_DROPPED],
        transfers_torn=transfers_torn,
        peers_unnamed=words[layout.C_PEERS_UNNAMED],
    )


def _operations(section: memoryview, words: memoryview, after: int) -> tuple[tuple[OperationRecord, ...], int]:
    # Whole columns at once: most records of a full ring were seen before, and unpacking each would cost milliseconds.
    numbers = _column(words, layout.OPERATIONS_BYTE, OPERATION_RECORDS, OPERATION_BYTES, _NUMBER_BYTE)
    progress = _column(words, layout.OPERATIONS_BYTE, OPERATION_RECORDS, OPERATION_BYTES, HALF_BYTES + _NUMBER_BYTE)
    done = _column(words, layout.OPERATIONS_BYTE, OPERATION_RECORDS, OPERATION_BYTES, HALF_BYTES + _DONE_BYTE)
    found: list[OperationRecord] = []
    torn = 0
    for slot, number in enumerate(numbers):
        if 0 < number <= after and progress[slot] == number and done[slot]:
            continue
        at = layout.OPERATIONS_BYTE + slot * OPERATION_BYTES
        if section[at : at + OPERATION_BYTES] == _NEVER_WRITTEN:
            continue
        record = _operation_at(section, at)
        if record is None:
            torn += 1
        elif record.number > after or record.state in UNDER_WAY:
            found.append(record)
    return tuple(sorted(found, key=lambda record: record.number)), torn


def _operation_at(section: memoryview, at: int) -> OperationRecord | None:
    """Return the record; None when its first half is torn."""
    found: OperationRecord | None = None
    for _ in range(READS_MAX):
        found = _operation(bytes(section[at : at + OPERATION_BYTES])) or found
        if found is not None and found.state is not State.UNKNOWN:
            break
    return found


def _operation(data: bytes) -> OperationRecord | None:
    seal, kind, reduction, dtype, algorithm, number, nbytes, view, sequence, enter_ns, group, members, partner, tag = (
        layout.OPERATION_STRUCT.unpack_from(data)
    )
    if seal != seal_of(data[SEAL_BYTES:HALF_BYTES]):
        return None
    state, (first_sent_ns, first_received_ns, progress_ns, done_ns, moved_bytes, culprit) = _progress(
        data[HALF_BYTES:], number
    )
    return OperationRecord(
        number=number,
        kind=_name(Kind, kind),
        reduction=_name(Reduction, reduction),
        dtype=_name(Dtype, dtype),
        algorithm=_name(Algorithm, algorithm),
        state=state,
        bytes=nbytes,
        group=group,
        members=members,
        view=view,
        sequence=sequence,
        partner=_index(partner),
        tag=tag,
        enter_ns=enter_ns,
        first_sent_ns=first_sent_ns,
        first_received_ns=first_received_ns,
        progress_ns=progress_ns,
        done_ns=done_ns,
        moved_bytes=moved_bytes,
        culprit=_index(culprit),
    )


def _progress(half: bytes, number: int) -> tuple[State, tuple[int, ...]]:
    """Return how far operation `number` is, by the second half of its record."""
    seal, state, own, first_sent_ns, first_received_ns, progress_ns, done_ns, moved_bytes, culprit, _ = (
        layout.PROGRESS_STRUCT.unpack(half)
    )
    if half == _NEVER_WRITTEN[HALF_BYTES:]:
        return State.STARTED, _NO_PROGRESS
    if seal != seal_of(half[SEAL_BYTES:]) or own > number or state not in _STATES:
        return State.UNKNOWN, _NO_PROGRESS
    if own < number:  # left by the operation that had this slot before
        return State.STARTED, _NO_PROGRESS
    return State(state), (first_sent_ns, first_received_ns, progress_ns, done_ns, moved_bytes, culprit)


def _transfers(
    section: memoryview, words: memoryview, after: int, wanted: set[int]
) -> tuple[tuple[TransferRecord, ...], int]:
    of_operation = _column(words, layout.TRANSFERS_BYTE, TRANSFER_RECORDS, TRANSFER_BYTES, _OPERATION_BYTE)
    found: list[TransferRecord] = []
    torn = 0
    for slot, operation in enumerate(of_operation):
        if operation <= after and operation not in wanted:
            continue
        at = layout.TRANSFERS_BYTE + slot * TRANSFER_BYTES
        record = _transfer_at(section, at)
        if record is None:
            torn += 1
        elif record.operation > after or record.operation in wanted:
            found.append(record)
    return tuple(sorted(found, key=lambda record: record.number)), torn


def _transfer_at(section: memoryview, at: int) -> TransferRecord | None:
    for _ in range(READS_MAX):
        data = bytes(section[at : at + TRANSFER_BYTES])
        seal, peer, number, operation, sent, received, send_blocked_ns, receive_blocked_ns, progress_ns = (
            layout.TRANSFER_STRUCT.unpack(data)
        )
        if seal == seal_of(data[SEAL_BYTES:]):
            return TransferRecord(
                number=number,
                operation=operation,
                peer=peer,
                sent_bytes=sent,
                received_bytes=received,
                send_blocked_ns=send_blocked_ns,
                receive_blocked_ns=receive_blocked_ns,
                progress_ns=progress_ns,
            )
    return None


def _names(section: memoryview, table_byte: int, entries: int, written: int) -> dict[int, str]:
    """Return the table's texts by id, the newest of each; an entry that is being written is not there yet."""
    found = {}
    for number in range(max(0, written - entries), written):
        at = table_byte + number % entries * layout.NAME_ENTRY_BYTES
        data = bytes(section[at : at + layout.NAME_ENTRY_BYTES])
        seal, key, length, _, text = layout.NAME_STRUCT.unpack(data)
        if seal == seal_of(data[SEAL_BYTES:]):
            found[key] = text[:length].decode(errors="replace")
    return found


def _column(words: memoryview, table_byte: int, entries: int, entry_bytes: int, field_byte: int) -> list[int]:
    """Return one 8-byte field of every entry of a table."""
    first = (table_byte + field_byte) // 8
    column: list[int] = words[first : first + entries * entry_bytes // 8 : entry_bytes // 8].tolist()
    return column


def _name(codes: type[enum.IntEnum], value: int) -> str:
    return codes(value).name.lower() if value in codes._value2member_map_ else f"code {value}"


def _index(peer: int) -> int | None:
    return None if peer == NOBODY else peer
