"""The worker's side of the operations section: what its collectives do, at about a microsecond a record.

Invariants:
1. It never blocks and never grows: what finds no room is counted (tests/unit/test_operations_writer.py).
2. An operation under way is not overwritten, however many follow it (tests/property/test_operations_ring.py).
3. A process that ends between any two of these lines leaves no wrong record (same test).
4. After `disarm` nothing is written: a forked child does not speak for its parent
   (tests/integration/test_operations_processes.py).
Not here: reading (operations.py), what lies where (operations_layout.py), whose memory it is (operations_source.py).
"""

from zlib import crc32

from elastic_run.runtime.edge import operations_layout as layout
from elastic_run.runtime.edge.operations_codes import Algorithm, Dtype, Kind, Reduction, State
from elastic_run.runtime.edge.operations_layout import (
    GROUP_ENTRIES,
    HALF_BYTES,
    NAME_BYTES,
    NOBODY,
    OPERATION_BYTES,
    OPERATION_RECORDS,
    OPERATIONS_BYTE,
    PEER_ENTRIES,
    SEAL_BYTES,
    SECTION_BYTES,
    TRANSFER_BYTES,
    TRANSFER_RECORDS,
    TRANSFERS_BYTE,
    UNNAMED,
)

DROPPED = 0
"""In place of an operation's number: it has no record. Every method takes it and does nothing but count."""

_pack_operation = layout.OPERATION_STRUCT.pack_into
_pack_progress = layout.PROGRESS_STRUCT.pack_into
_pack_transfer = layout.TRANSFER_STRUCT.pack_into


# The packing calls stay whole lines, in the order of the layout's fields, so that one can be read beside the other.


class OperationsWriter:
    """One worker's records of its collective operations. Not for several threads at once.

    Times are CLOCK_MONOTONIC nanoseconds; 0 says that it has not happened.
    """

    def __init__(self, section: memoryview) -> None:
        """Write into `section`: writable bytes that hold the table of the section, as `telemetry.create` leaves it."""
        self._use(section)
        words = self._words
        self._number = words[layout.C_OPERATIONS]
        self._transfer_number = words[layout.C_TRANSFERS]
        self._group_number = words[layout.C_GROUPS]
        self._slots: dict[int, int] = {}  # number -> slot of the operations under way
        self._busy = bytearray(OPERATION_RECORDS)
        self._next_slot = self._number % OPERATION_RECORDS
        self._peers: dict[str, int] = {}
        self._groups: dict[int, tuple[str, int]] = {}  # group -> name, its number

    def begin(  # noqa: PLR0913 - one record
        self,
        kind: Kind,
        *,
        group: int,
        view: int,
        sequence: int,
        enter_ns: int,
        members: int,
        nbytes: int = 0,
        reduction: Reduction = Reduction.NONE,
        dtype: Dtype = Dtype.NONE,
        algorithm: Algorithm = Algorithm.OTHER,
        partner: int = NOBODY,
        tag: int = 0,
    ) -> int:
        """Record that an operation was entered; return its number, DROPPED when there is no room.

        partner: peer index of the root, or of the other side of a send or receive.
        """
        slot = self._next_slot
        if self._busy[slot]:
            slot = self._free_slot()
            if slot < 0:
                self._words[layout.C_OPERATIONS_DROPPED] += 1
                return DROPPED
        number = self._number = self._number + 1
        at = OPERATIONS_BYTE + slot * OPERATION_BYTES
        memory = self._memory
        # fmt: off
        _pack_operation(
            memory, at, 0, kind, reduction, dtype, algorithm, number, nbytes, view, sequence, enter_ns,
            group, members, partner, tag,
        )
        # fmt: on
        self._halves[at >> 2] = crc32(memory[at + SEAL_BYTES : at + HALF_BYTES])
        self._words[layout.C_OPERATIONS] = number
        self._slots[number] = slot
        self._busy[slot] = 1
        self._next_slot = (slot + 1) % OPERATION_RECORDS
        return number

    def update(
        self,
        operation: int,
        *,
        first_sent_ns: int = 0,
        first_received_ns: int = 0,
        progress_ns: int = 0,
        moved_bytes: int = 0,
    ) -> None:
        """Record how far an operation under way is. moved_bytes: of payload, sent and received so far."""
        slot = self._slots.get(operation)
        if slot is not None:
            # fmt: off
            self._progress(
                slot, State.STARTED, operation, first_sent_ns, first_received_ns, progress_ns, 0, moved_bytes, NOBODY
            )
            # fmt: on

    def finish(
        self,
        operation: int,
        state: State,
        *,
        done_ns: int,
        first_sent_ns: int = 0,
        first_received_ns: int = 0,
        progress_ns: int = 0,
        moved_bytes: int = 0,
        culprit: int = NOBODY,
    ) -> None:
        """Record how an operation ended, once."""
        slot = self._slots.pop(operation, None)
        if slot is not None:
            # fmt: off
            self._progress(
                slot, state, operation, first_sent_ns, first_received_ns, progress_ns, done_ns, moved_bytes, culprit
            )
            # fmt: on
            self._busy[slot] = 0

    def transfer(
        self,
        operation: int,
        peer: int,
        *,
        sent_bytes: int,
        received_bytes: int,
        send_blocked_ns: int,
        receive_blocked_ns: int,
        progress_ns: int,
        record: int = 0,
    ) -> int:
        """Record an operation's traffic with one peer so far; return the record's number for later updates of it.

        record: the number returned before; one that was overwritten since is written anew.
        """
        if operation == DROPPED:
            self._words[layout.C_TRANSFERS_DROPPED] += 1
            return 0
        number = record
        if not number or number + TRANSFER_RECORDS <= self._transfer_number:
            number = self._transfer_number = self._transfer_number + 1
        at = TRANSFERS_BYTE + (number - 1) % TRANSFER_RECORDS * TRANSFER_BYTES
        memory = self._memory
        # fmt: off
        _pack_transfer(
            memory, at, 0, peer, number, operation,
            sent_bytes, received_bytes, send_blocked_ns, receive_blocked_ns, progress_ns,
        )
        # fmt: on
        self._halves[at >> 2] = crc32(memory[at + SEAL_BYTES : at + TRANSFER_BYTES])
        self._words[layout.C_TRANSFERS] = self._transfer_number
        return number

    def peer(self, worker: str) -> int:
        """Return the index that stands for a worker; UNNAMED when the table is full."""
        index = self._peers.get(worker)
        if index is None:
            index = self._words[layout.C_PEERS]
            if index >= PEER_ENTRIES:
                self._words[layout.C_PEERS_UNNAMED] += 1
                return UNNAMED
            self._name(layout.PEERS_BYTE, index, index, worker)
            self._peers[worker] = index
            self._words[layout.C_PEERS] = index + 1
        return index

    def group(self, group: int, name: str) -> None:
        """Name a group. The newest names are kept."""
        known, number = self._groups.pop(group, ("", -GROUP_ENTRIES))
        if known != name or number + GROUP_ENTRIES <= self._group_number:
            number = self._group_number
            self._name(layout.GROUPS_BYTE, number % GROUP_ENTRIES, group, name)
            self._words[layout.C_GROUPS] = self._group_number = number + 1
        self._groups[group] = (name, number)
        if len(self._groups) > GROUP_ENTRIES:
            del self._groups[next(iter(self._groups))]

    def disarm(self) -> None:
        """From now on write to memory of this process only."""
        self._use(memoryview(bytearray(SECTION_BYTES)))

    def _use(self, section: memoryview) -> None:
        self._memory = section
        self._halves = section.cast("I")
        self._words = section.cast("Q")

    def _progress(  # noqa: PLR0913, PLR0917 - one record
        self,
        slot: int,
        state: int,
        number: int,
        first_sent_ns: int,
        first_received_ns: int,
        progress_ns: int,
        done_ns: int,
        moved_bytes: int,
        culprit: int,
    ) -> None:
        at = OPERATIONS_BYTE + slot * OPERATION_BYTES + HALF_BYTES
        memory = self._memory
        # fmt: off
        _pack_progress(
            memory, at, 0, state, number, first_sent_ns, first_received_ns, progress_ns, done_ns,
            moved_bytes, culprit, 0,
        )
        # fmt: on
        self._halves[at >> 2] = crc32(memory[at + SEAL_BYTES : at + HALF_BYTES])

    def _free_slot(self) -> int:
        """Return the next slot whose operation has ended, -1 when all are under way."""
        slot = self._busy.find(0, self._next_slot)
        return slot if slot >= 0 else self._busy.find(0)

    def _name(self, table_byte: int, entry: int, key: int, name: str) -> None:
        text = name.encode(errors="replace")[:NAME_BYTES].decode(errors="ignore").encode()  # no half letter
        at = table_byte + entry * layout.NAME_ENTRY_BYTES
        layout.NAME_STRUCT.pack_into(self._memory, at, 0, key, len(text), 0, text)
        self._halves[at >> 2] = crc32(self._memory[at + SEAL_BYTES : at + layout.NAME_ENTRY_BYTES])
