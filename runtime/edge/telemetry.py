"""The agent's side of a worker's telemetry file: makes it, reads it while the worker runs, hangs or is
dead, and asks the worker to stop.

One file per worker in the run directory, mode 0600, mapped by both sides; every word is one aligned 8-byte store, so no
word is ever torn. Times are CLOCK_MONOTONIC of the host, the same for agent and worker.
Invariants:
1. What is not a whole file of this layout is refused with CodecError (tests/unit/test_telemetry.py).
2. Every record returned was written as such, in order; the others are counted (tests/property/test_telemetry_ring.py).
Not here: the worker's side (telemetry_writer.py); what lies where (telemetry_layout.py); the records of operations
(operations.py); judging progress (the agent).
"""

import mmap
import os
import struct
import time
from dataclasses import dataclass

from elastic_run.runtime.edge import operations_layout
from elastic_run.runtime.edge import telemetry_layout as layout
from elastic_run.runtime.edge.operations import Operations, read_operations
from elastic_run.runtime.edge.telemetry_layout import PHASES, Phase, check_header, check_size, record_word, seal
from elastic_run.runtime.protocol.errors import CodecError, InvariantViolated

NS_PER_S = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One finished optimizer step."""

    step: int
    start_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """What a worker's file said when it was read."""

    pid: int
    """0: no process has written yet."""
    rank: int
    world_size: int
    view: int
    phase: Phase
    step: int
    """Optimizer steps finished in this life of the worker."""
    step_end_ns: int
    """End of the last one; 0: none."""
    change_ns: int
    """When the step or the phase last changed; 0: never."""
    parked_at_step: int
    """The step after which the worker parked last; 0: never."""
    stop_at_step: int
    requested_view: int
    records: tuple[StepRecord, ...]
    """The recent steps, oldest first."""
    records_torn: int
    """Records that were being overwritten while they were read."""
    records_overwritten: int
    """Steps too old for the ring."""

    def step_rate_per_s(self) -> float | None:
        """Steps per second over the recent records; None when they do not tell."""
        if len(self.records) < 2:
            return None
        first, last = self.records[0], self.records[-1]
        elapsed_ns = last.end_ns - first.end_ns
        return (last.step - first.step) * NS_PER_S / elapsed_ns if elapsed_ns > 0 else None

    def age_s(self, now_ns: int) -> float | None:
        """Seconds from the last change to `now_ns` (monotonic); None when there was none."""
        return max(0, now_ns - self.change_ns) / NS_PER_S if self.change_ns else None


def create(path: str, rank: int, world_size: int, view: int) -> None:
    """Make the file of a worker that is about to start, with mode 0600. Raises FileExistsError, OSError."""
    words = bytearray(layout.STEPS_END_BYTE)
    struct.pack_into(f"={len(layout.HEADER)}Q", words, 0, *layout.HEADER)
    struct.pack_into("=3Q", words, layout.RANK * layout.WORD_BYTES, rank, world_size, view)
    struct.pack_into("=Q", words, layout.AGENT_BEAT_NS * layout.WORD_BYTES, time.monotonic_ns())
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        # Reserved now: a full disk would otherwise kill the worker by SIGBUS at some later store.
        os.posix_fallocate(fd, 0, layout.FILE_BYTES)
        os.write(fd, words)
        os.pwrite(fd, operations_layout.table_bytes(), layout.STEPS_END_BYTE)
    except OSError:
        os.unlink(path)
        raise
    finally:
        os.close(fd)


class TelemetryFile:
    """A worker's file, mapped. Usable until `close`, whatever became of the worker."""

    def __init__(self, path: str, *, read_only: bool = False) -> None:
        """Raises CodecError when the file cannot be opened or is not a telemetry file.

        read_only: for a look at any file, by a link too; the worker cannot be asked for anything.
        """
        self._path = path
        # A pipe must not hold up who opens it; a link must not lead the agent's stores elsewhere.
        flags = os.O_RDONLY | os.O_NONBLOCK if read_only else os.O_RDWR | os.O_NOFOLLOW
        try:
            self._fd = os.open(path, flags | os.O_CLOEXEC)
        except OSError as error:
            raise CodecError(f"{path}: cannot open the telemetry file: {error.strerror}") from None
        try:
            self._size_bytes = os.fstat(self._fd).st_size
            check_size(self._size_bytes, path)
            access = mmap.ACCESS_READ if read_only else mmap.ACCESS_WRITE
            self._map = mmap.mmap(self._fd, self._size_bytes, access=access)
        except OSError as error:  # a directory has a size too
            os.close(self._fd)
            raise CodecError(f"{path}: cannot map the telemetry file: {error.strerror}") from None
        except BaseException:
            os.close(self._fd)
            raise
        self._words = memoryview(self._map).cast("B").cast("Q")
        try:
            self._check()
        except CodecError:
            self.close()
            raise

    def read(self, *, records_max: int = layout.STEP_RECORDS) -> Telemetry:
        """Return what the file says now, with its newest records. Raises CodecError when it was damaged since.

        All 256 records take half a millisecond; for a heartbeat a few do.
        """
        self._check()
        words = self._words
        if words[layout.PHASE] >= len(PHASES):
            raise CodecError(f"{self._path}: phase {words[layout.PHASE]} is unknown")
        step = words[layout.STEP]  # read before the records: they are then at least as new
        first = max(1, step - min(records_max, layout.STEP_RECORDS) + 1)
        records = [record for n in range(first, step + 1) if (record := self._record(n)) is not None]
        return Telemetry(
            pid=words[layout.PID],
            rank=words[layout.RANK],
            world_size=words[layout.WORLD_SIZE],
            view=words[layout.VIEW],
            phase=PHASES[words[layout.PHASE]],
            step=step,
            step_end_ns=words[layout.STEP_END_NS],
            change_ns=words[layout.CHANGE_NS],
            parked_at_step=words[layout.PARKED_AT_STEP],
            stop_at_step=words[layout.STOP_AT_STEP],
            requested_view=words[layout.REQUESTED_VIEW],
            records=tuple(records),
            records_torn=step + 1 - first - len(records),
            records_overwritten=max(0, step - layout.STEP_RECORDS),
        )

    def read_operations(self, *, after: int = 0) -> Operations:
        """Return what the worker's collectives did and do; see `operations.read_operations`. Raises CodecError."""
        self._check()
        # Released also when it raises: a view that lives on in a traceback would keep the file from being closed.
        with self._words.cast("B") as data, data[layout.STEPS_END_BYTE :] as section:
            return read_operations(section, self._path, after=after)

    def request_stop(self, *, at_step: int, view: int) -> None:
        """Ask the worker to park after step `at_step`, or at once if that is past, for `view`, newer than its own."""
        if at_step < 1:
            raise InvariantViolated(f"a worker cannot stop after step {at_step}: 1 is the first")
        self._check()
        self._words[layout.STOP_AT_STEP] = 0
        self._words[layout.REQUESTED_VIEW] = view
        self._words[layout.STOP_AT_STEP] = at_step  # last: a step that is seen has its view

    def withdraw_stop(self) -> None:
        """Take the request back; a worker that is parked already needs Resume too."""
        self._check()
        self._words[layout.STOP_AT_STEP] = 0

    def beat(self) -> None:
        """Say that the agent is alive and has no reason to believe that the node was left out of the job."""
        self._check()
        self._words[layout.AGENT_BEAT_NS] = time.monotonic_ns()

    def close(self) -> None:
        self._words.release()
        self._map.close()
        os.close(self._fd)

    def _check(self) -> None:
        # Touching a page that was truncated away is SIGBUS, so the size comes first.
        size_bytes = os.fstat(self._fd).st_size
        if size_bytes != self._size_bytes:
            raise CodecError(f"{self._path}: its size changed from {self._size_bytes} to {size_bytes} bytes")
        check_header(self._words, size_bytes, self._path)

    def _record(self, step: int) -> StepRecord | None:
        at = record_word(step)
        sealed, found, start_ns, end_ns = (self._words[at + i] for i in range(layout.RECORD_WORDS))
        if found != step or sealed != seal(step, start_ns, end_ns) or end_ns < start_ns:
            return None
        return StepRecord(step=step, start_ns=start_ns, end_ns=end_ns)
