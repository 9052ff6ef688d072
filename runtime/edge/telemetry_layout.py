"""Layout 2 of a worker's telemetry file: which aligned 8-byte word lies where (unsigned, native byte order).

    byte    0  header   magic, layout, file bytes, then the table of sections (below), written once by the agent
    byte  128  worker   written by the worker only: pid, rank, world, view, phase, steps, times, parked at
    byte  256  control  written by the agent only: stop at step, requested view, last sign of life
    byte  512  steps    ring of records: seal, step, start ns, end ns; step n lies in slot (n - 1) mod capacity
    after it   operations: what the collectives do (operations_layout.py)

A record's seal is written last and binds the step to its times, so a record that was half written, in whatever order,
is seen. docs/telemetry.md describes the file for readers in other languages.
Invariants: 1. nothing but a whole file of this layout passes `check_header` (tests/unit/test_telemetry.py); 2. no torn
record passes its seal (tests/property/test_telemetry_ring.py).
Not here: the worker's side (telemetry_writer.py); the agent's (telemetry.py). Imported by the worker before its script:
standard library only, and little of it.
"""

import enum
import sys

from elastic_run.runtime.edge.operations_layout import SECTION_BYTES
from elastic_run.runtime.protocol.errors import CodecError

WORD_BYTES = 8
WORD_MASK = (1 << 64) - 1
MAGIC = int.from_bytes(b"ELRUNTEL", sys.byteorder)
LAYOUT = 2

STEP_RECORDS = 256  # a power of two; at 1,000 steps a second a quarter of a second of history
RECORD_WORDS = 4
FILE_BYTES_MAX = 64 * 1024 * 1024  # what any later layout may ask a reader to map

# Header words.
H_MAGIC, H_LAYOUT, H_FILE_BYTES = 0, 1, 2
H_WORKER_BYTE, H_CONTROL_BYTE = 3, 4
H_STEPS_BYTE, H_STEPS_RECORDS, H_STEPS_RECORD_WORDS = 5, 6, 7
H_OPERATIONS_BYTE, H_OPERATIONS_BYTES = 8, 9
HEADER_WORDS = 16

# Words of the file: the worker's.
PID, RANK, WORLD_SIZE, VIEW, PHASE, STEP, STEP_END_NS, CHANGE_NS, PARKED_AT_STEP = range(HEADER_WORDS, HEADER_WORDS + 9)
# The agent's, on a cache line of their own: the worker reads them after every step.
STOP_AT_STEP, REQUESTED_VIEW, AGENT_BEAT_NS = 32, 33, 34
# The ring.
STEPS_WORD = 64
_SEAL_STEP, _SEAL_START = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F
_SEAL_END, _SEAL_OFFSET = 0x165667B19E3779F9, 0xD6E8FEB86659FD93
STEPS_END_BYTE = (STEPS_WORD + STEP_RECORDS * RECORD_WORDS) * WORD_BYTES
FILE_BYTES = STEPS_END_BYTE + SECTION_BYTES


class Phase(enum.StrEnum):
    """What the worker's process is doing. On file: the position in this list."""

    STARTING = "starting"  # the bootstrap has not begun the script
    IMPORTING = "importing"  # the script runs, and has begun no optimizer step
    RUNNING = "running"
    PARKED = "parked"  # at its safe point, between two steps
    FINISHED = "finished"  # exited by itself with code 0
    FAILED = "failed"


PHASES = tuple(Phase)

HEADER = (
    MAGIC,
    LAYOUT,
    FILE_BYTES,
    PID * WORD_BYTES,
    STOP_AT_STEP * WORD_BYTES,
    STEPS_WORD * WORD_BYTES,
    STEP_RECORDS,
    RECORD_WORDS,
    STEPS_END_BYTE,
    SECTION_BYTES,
)


def check_size(size_bytes: int, where: str) -> None:
    """Raise CodecError unless a file of `size_bytes` can be mapped as words and begin with a header."""
    if not HEADER_WORDS * WORD_BYTES <= size_bytes <= FILE_BYTES_MAX or size_bytes % WORD_BYTES:
        raise CodecError(f"{where}: {size_bytes} bytes is no size of a telemetry file")


def check_header(words: memoryview, size_bytes: int, where: str) -> None:
    """Raise CodecError unless `words` begin a whole telemetry file of this layout whose size is `size_bytes`."""
    if words[H_MAGIC] != MAGIC:
        raise CodecError(f"{where}: not a telemetry file (wrong magic)")
    if words[H_LAYOUT] != LAYOUT:
        raise CodecError(f"{where}: telemetry layout {words[H_LAYOUT]}, this program reads layout {LAYOUT}")
    if words[H_FILE_BYTES] != size_bytes:
        raise CodecError(f"{where}: has {size_bytes} bytes, its header says {words[H_FILE_BYTES]}")
    for position, expected in enumerate(HEADER):
        if words[position] != expected:
            raise CodecError(f"{where}: header word {position} is {words[position]}, expected {expected}")


def record_word(step: int) -> int:
    """Return the first word of the record of `step` (1 is the first step)."""
    return STEPS_WORD + ((step - 1) & (STEP_RECORDS - 1)) * RECORD_WORDS


def seal(step: int, start_ns: int, end_ns: int) -> int:
    """Return the word that binds a record's fields together; no record of zeros has it.

    Odd factors without a pattern, because times differ in patterns: two records a whole step apart have equal
    differences in both times, which must not cancel.
    """
    return (step * _SEAL_STEP + start_ns * _SEAL_START + end_ns * _SEAL_END + _SEAL_OFFSET) & WORD_MASK
