"""Whose telemetry file the collectives of this process write into.

Under an agent it is the worker's file, which the worker's session offers here. Without one it is a file of the
process's own, when ELASTIC_RUN_TELEMETRY names it, or memory that ends with the process: the collectives do not care.
Invariants (tests/integration/test_operations_processes.py):
1. A file that is no telemetry file, or that a living process uses, is left alone.
2. A forked child writes nothing.
Not here: the records (operations_writer.py); the session of a worker (runtime/worker_session.py).
"""

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from elastic_run.runtime.protocol.errors import CodecError, UserError

if TYPE_CHECKING:
    from elastic_run.runtime.edge.operations_writer import OperationsWriter

TELEMETRY = "ELASTIC_RUN_TELEMETRY"
PID_MARK = "%p"
"""In the path it stands for the process's id: workers of one host that share an environment get a file each."""


class OperationsSource:
    """Gives every collective of a process the same writer."""

    def __init__(self) -> None:
        self._offered: Callable[[], OperationsWriter] | None = None
        self._private: OperationsWriter | None = None

    def offer(self, make: "Callable[[], OperationsWriter]") -> None:
        """Say whose records to write from now on, under an agent: `TelemetryWriter.operations` of the worker's file."""
        self._offered = make

    def wanted(self, environment: Mapping[str, str]) -> bool:
        """Say whether anybody can read what is recorded: there is an agent's file, or one is named."""
        return self._offered is not None or bool(environment.get(TELEMETRY))

    def writer(self, environment: Mapping[str, str]) -> "OperationsWriter":
        """Return the writer of this process. Raises UserError when ELASTIC_RUN_TELEMETRY cannot be used."""
        if self._offered is not None:
            return self._offered()
        if self._private is None:
            self._private = private(environment.get(TELEMETRY) or None)
        return self._private


OF_THIS_PROCESS = OperationsSource()


def private(path: str | None, *, rank: int = 0, world_size: int = 0) -> "OperationsWriter":
    """Return a writer into a new telemetry file at `path`, or into memory of this process only.

    The file stays when the process ends. Raises UserError when there is something else, or a living process's file.
    """
    from elastic_run.runtime.edge.operations_layout import SECTION_BYTES, table_bytes
    from elastic_run.runtime.edge.operations_writer import OperationsWriter

    if path is None:
        memory = bytearray(SECTION_BYTES)
        memory[: len(table_bytes())] = table_bytes()
        return OperationsWriter(memoryview(memory))  # memory a forked child has a copy of: nothing to disarm
    # Loaded here: under an agent the file is there already.
    from elastic_run.runtime.edge import telemetry
    from elastic_run.runtime.edge.telemetry_layout import Phase
    from elastic_run.runtime.edge.telemetry_writer import TelemetryWriter

    path = path.replace(PID_MARK, str(os.getpid()))
    _remove_stale(path)
    try:
        telemetry.create(path, rank, world_size, 0)
    except OSError as error:
        raise UserError(f"{TELEMETRY}: {path}: cannot make the file: {error.strerror}") from None
    file = TelemetryWriter(path)
    file.begin(pid=os.getpid())
    file.set_phase(Phase.RUNNING)
    os.register_at_fork(after_in_child=file.disarm)
    return file.operations()


def _remove_stale(path: str) -> None:
    """Remove what a process that is gone left at `path`. Raises UserError when it is something else."""
    from elastic_run.runtime.edge.telemetry import TelemetryFile

    if not os.path.lexists(path):
        return
    try:
        file = TelemetryFile(path)
        try:
            pid = file.read(records_max=0).pid
        finally:
            file.close()
    except CodecError as error:
        raise UserError(f"{TELEMETRY}: {error}: choose a path where there is nothing") from None
    if pid and os.path.exists(f"/proc/{pid}"):
        raise UserError(f"{TELEMETRY}: {path} is in use by process {pid}: put {PID_MARK} into the path")
    os.unlink(path)
