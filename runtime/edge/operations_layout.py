"""The operations section of a worker's telemetry file: which field lies where (docs/telemetry.md says it for readers).

    byte      0  table     where the parts below begin, how many entries they have, how large one is; never changes
    byte    128  counters  one aligned 8-byte word each
    then         operations, transfers: rings of records; peers, groups: tables of names that records refer to

An operation's record is two cache lines. The first says what it is and is written once, when it is entered; the second
says how far it is, and counts only when it carries the same number: beginning costs one write, and a process killed
while it ends an operation leaves its beginning readable. Every record and half begins with its seal, the CRC-32 of the
rest, zero while it is written; zeros have another CRC, so what was never written is no record.
Imported by the worker before its script: little of it.
Invariants: 1. docs/telemetry.md has these offsets (tests/unit/test_operations_layout.py); 2. no torn record passes its
seal, but by a chance of 2^-32 (tests/property/test_operations_ring.py).
Not here: what codes stand for (operations_codes.py), the rest of the file (telemetry_layout.py).
"""

import struct
from zlib import crc32

Fields = tuple[tuple[str, str], ...]
"""Names and `struct` codes, in order, without gaps; native byte order."""

OPERATION_RECORDS = 1024  # a second of history at 1,000 operations a second; an agent looks twice a second
TRANSFER_RECORDS = 4096  # four peers an operation: a ring has two, and what meets more of them is rarely small
PEER_ENTRIES = 1024  # a worker meets its ring neighbours, its host's workers, and who replaces them
GROUP_ENTRIES = 256
NAME_BYTES = 64

NOBODY = 0xFFFF_FFFF
"""In place of a peer's index: no peer."""
UNNAMED = 0xFFFF_FFFE
"""A peer for which the table had no room."""

OPERATION: Fields = (
    ("seal", "I"),
    ("kind", "B"),
    ("reduction", "B"),
    ("dtype", "B"),
    ("algorithm", "B"),
    ("number", "Q"),
    ("bytes", "Q"),
    ("view", "Q"),
    ("sequence", "Q"),
    ("enter_ns", "Q"),
    ("group", "I"),
    ("members", "I"),
    ("partner", "I"),
    ("tag", "I"),
)
PROGRESS: Fields = (
    ("progress_seal", "I"),
    ("state", "I"),
    ("progress_number", "Q"),
    ("first_sent_ns", "Q"),
    ("first_received_ns", "Q"),
    ("progress_ns", "Q"),
    ("done_ns", "Q"),
    ("moved_bytes", "Q"),
    ("culprit", "I"),
    ("zero", "I"),
)
TRANSFER: Fields = (
    ("seal", "I"),
    ("peer", "I"),
    ("number", "Q"),
    ("operation", "Q"),
    ("sent_bytes", "Q"),
    ("received_bytes", "Q"),
    ("send_blocked_ns", "Q"),
    ("receive_blocked_ns", "Q"),
    ("progress_ns", "Q"),
)
NAME: Fields = (("seal", "I"), ("id", "I"), ("length", "I"), ("zero", "I"), ("text", f"{NAME_BYTES}s"))


def structure(fields: Fields) -> struct.Struct:
    return struct.Struct("=" + "".join(code for _, code in fields))


def offset_of(fields: Fields, name: str) -> int:
    """Return the byte of a field within its record."""
    position = [field for field, _ in fields].index(name)
    return structure(fields[:position]).size


OPERATION_STRUCT, PROGRESS_STRUCT = structure(OPERATION), structure(PROGRESS)
TRANSFER_STRUCT, NAME_STRUCT = structure(TRANSFER), structure(NAME)
HALF_BYTES = OPERATION_STRUCT.size
OPERATION_BYTES = HALF_BYTES + PROGRESS_STRUCT.size
TRANSFER_BYTES = TRANSFER_STRUCT.size
NAME_ENTRY_BYTES = NAME_STRUCT.size
SEAL_BYTES = 4

TABLE_BYTE, COUNTERS_BYTE = 0, 128
OPERATIONS_BYTE = 256
TRANSFERS_BYTE = OPERATIONS_BYTE + OPERATION_RECORDS * OPERATION_BYTES
PEERS_BYTE = TRANSFERS_BYTE + TRANSFER_RECORDS * TRANSFER_BYTES
GROUPS_BYTE = PEERS_BYTE + PEER_ENTRIES * NAME_ENTRY_BYTES
SECTION_BYTES = GROUPS_BYTE + GROUP_ENTRIES * NAME_ENTRY_BYTES

TABLE = (
    *(OPERATIONS_BYTE, OPERATION_RECORDS, OPERATION_BYTES),
    *(TRANSFERS_BYTE, TRANSFER_RECORDS, TRANSFER_BYTES),
    *(PEERS_BYTE, PEER_ENTRIES, NAME_ENTRY_BYTES),
    *(GROUPS_BYTE, GROUP_ENTRIES, NAME_ENTRY_BYTES),
)


# Counters: words of the section.
C_OPERATIONS = COUNTERS_BYTE // 8  # records begun: the number of the newest
C_OPERATIONS_DROPPED = C_OPERATIONS + 1  # without a record: as many were under way as the ring has records
C_TRANSFERS = C_OPERATIONS + 2
C_TRANSFERS_DROPPED = C_OPERATIONS + 3  # of operations without a record
C_PEERS = C_OPERATIONS + 4
C_PEERS_UNNAMED = C_OPERATIONS + 5  # times a peer was asked for that found no room
C_GROUPS = C_OPERATIONS + 6  # names written: name n, from 0, lies in entry n mod their number


def seal_of(sealed: bytes | memoryview) -> int:
    """Return the seal of a record or half whose bytes after its seal are `sealed`."""
    return crc32(sealed)


def table_bytes() -> bytes:
    """Return what a section begins with; all else is zero until the worker writes."""
    return struct.pack(f"={len(TABLE)}Q", *TABLE)
