"""The worker's side of its telemetry file: marks of progress that outlive a hang and a crash, about a microsecond each.

Invariants:
1. The word that makes news visible is stored last: a record before its seal, the seal before the count of steps
   (tests/property/test_telemetry_ring.py).
2. After `disarm` nothing is written: a forked child does not speak for its parent
   (tests/integration/test_safe_point.py).
Not here: creating the file and reading it (telemetry.py); what lies where (telemetry_layout.py); what the collectives
do (operations_writer.py).
"""

import mmap
import os
import time
from typing import TYPE_CHECKING

from elastic_run.runtime.edge import telemetry_layout as layout
from elastic_run.runtime.edge.telemetry_layout import PHASES, Phase, check_header, check_size, record_word, seal
from elastic_run.runtime.protocol.errors import CodecError

if TYPE_CHECKING:
    from elastic_run.runtime.edge.operations_writer import OperationsWriter


class TelemetryWriter:
    """One worker's marks. Not for several threads at once."""

    def __init__(self, path: str) -> None:
        """Map the file the agent made. Raises CodecError when it is none."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise CodecError(f"{path}: cannot open the telemetry file: {error.strerror}") from None
        try:
            size_bytes = os.fstat(fd).st_size
            check_size(size_bytes, path)
            self._words = memoryview(mmap.mmap(fd, size_bytes)).cast("B").cast("Q")
        finally:
            os.close(fd)
        check_header(self._words, size_bytes, path)
        self._step = self._words[layout.STEP]
        self._operations: OperationsWriter | None = None

    def begin(self, *, pid: int) -> None:
        """Say which process writes here from now on."""
        self._words[layout.PID] = pid
        self.set_phase(Phase.STARTING)

    def set_view(self, view: int) -> None:
        self._words[layout.VIEW] = view

    def set_phase(self, phase: Phase) -> None:
        self._words[layout.PHASE] = PHASES.index(phase)
        self._words[layout.CHANGE_NS] = time.monotonic_ns()

    def park(self, step: int) -> None:
        """Say that the worker waits at its safe point after `step`."""
        self._words[layout.PARKED_AT_STEP] = step
        self.set_phase(Phase.PARKED)

    def record_step(self, start_ns: int, end_ns: int) -> int:
        """Record one more finished optimizer step by its monotonic times; return its number."""
        words = self._words
        step = self._step = self._step + 1
        at = record_word(step)
        words[at] = 0  # whoever reads the slot now is told that it is being written
        words[at + 1] = step
        words[at + 2] = start_ns
        words[at + 3] = end_ns
        words[at] = seal(step, start_ns, end_ns)
        words[layout.STEP_END_NS] = end_ns
        words[layout.CHANGE_NS] = end_ns
        words[layout.STEP] = step
        return step

    def stop_request(self) -> tuple[int, int]:
        """Return (stop at step, requested view); the step is 0 when none is requested."""
        # The agent stores the step last, so a step that is seen has its view.
        return self._words[layout.STOP_AT_STEP], self._words[layout.REQUESTED_VIEW]

    def agent_beat_ns(self) -> int:
        """Return when the agent last gave a sign of life."""
        return self._words[layout.AGENT_BEAT_NS]

    def operations(self) -> "OperationsWriter":
        """Return the writer of the file's operations section, always the same."""
        # Loaded with the collectives: a script without them does not pay.
        from elastic_run.runtime.edge.operations_writer import OperationsWriter

        if self._operations is None:
            self._operations = OperationsWriter(self._words.cast("B")[layout.STEPS_END_BYTE :])
        return self._operations

    def disarm(self) -> None:
        """From now on write to memory of this process only."""
        if self._operations is not None:
            self._operations.disarm()
        self._words = memoryview(bytearray(len(self._words) * layout.WORD_BYTES)).cast("Q")
        self._words[layout.AGENT_BEAT_NS] = layout.WORD_MASK  # nor does it wait for its parent's agent
