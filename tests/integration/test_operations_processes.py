"""Records of operations across processes: read while another one writes, hangs, or is killed; forked; in the way."""

import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from elastic_run.runtime.edge import telemetry
from elastic_run.runtime.edge.operations import Operations
from elastic_run.runtime.edge.operations_codes import Kind, State
from elastic_run.runtime.edge.operations_source import OperationsSource, private
from elastic_run.runtime.edge.telemetry import TelemetryFile
from elastic_run.runtime.edge.telemetry_layout import Phase
from elastic_run.runtime.edge.telemetry_writer import TelemetryWriter
from elastic_run.runtime.protocol.errors import UserError

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "record_operations.py"
BOUND_S = 60
KILLS = 12
LOOKS = 30


@contextmanager
def recording(path: str, how: str) -> Iterator[subprocess.Popen[str]]:
    """A process that records; it has begun its fourth operation."""
    environment = {**os.environ, "ELASTIC_RUN_TELEMETRY": path}
    process = subprocess.Popen([sys.executable, SCRIPT, how], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=BOUND_S)


def look(path: str) -> Operations:
    file = TelemetryFile(path, read_only=True)
    try:
        return file.read_operations()
    finally:
        file.close()


def assert_true(found: Operations) -> None:
    """Whatever was returned is what the script wrote."""
    for record in found.operations:
        assert (record.kind, record.group, record.view, record.members) == ("all_reduce", 5, 2, 2)
        assert record.sequence == record.number == record.bytes
        if record.state is State.DONE:
            assert record.moved_bytes == 2 * record.number
            assert record.done_ns >= record.enter_ns > 0
    for transfer in found.transfers:
        assert transfer.number == transfer.operation == transfer.sent_bytes == transfer.progress_ns
    assert (found.peer_name(0), found.group_name(5)) == ("w-peer", "world")


def test_a_hung_operation_is_seen_before_and_after_its_process_is_killed(tmp_path: Path) -> None:
    path = str(tmp_path / "t")
    with recording(path, "hang") as process:
        alive = look(path)
        file = TelemetryFile(path)
        process.send_signal(signal.SIGKILL)
        process.wait(BOUND_S)
        dead = file.read_operations()
        told = file.read()
        file.close()
    assert alive == dead == look(path)
    assert_true(dead)
    (hung,) = dead.under_way()
    assert (hung.number, hung.state, hung.moved_bytes) == (4, State.STARTED, 4)
    assert hung.first_sent_ns > hung.enter_ns
    assert [record.state for record in dead.operations] == [State.DONE] * 3 + [State.STARTED]
    assert (told.pid, told.phase) == (process.pid, Phase.RUNNING)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_a_storm_of_records_is_read_truly_from_outside_and_the_hung_one_is_kept(tmp_path: Path) -> None:
    path = str(tmp_path / "t")
    with recording(path, "storm"):
        seen = 0
        for _ in range(LOOKS):
            found = look(path)
            assert_true(found)
            assert found.under_way()[0].number == 4
            assert found.operations_torn <= 1
            seen = found.operations_begun
    assert seen > 4


def test_killed_in_the_middle_of_a_storm_the_file_says_nothing_untrue(tmp_path: Path) -> None:
    chance = random.Random(7)
    for attempt in range(KILLS):
        path = str(tmp_path / f"t{attempt}")
        with recording(path, "storm") as process:
            until = chance.randrange(5, 3000)  # another place in the storm each time
            file = TelemetryFile(path)
            _await_begun(file, until)
            process.kill()
            process.wait(BOUND_S)
            found = file.read_operations()
            file.close()
        assert_true(found)
        assert found.under_way()[0].number == 4
        assert len(found.under_way()) <= 2
        assert found.operations_torn + found.transfers_torn <= 1


def test_forked_child_writes_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "t")
    writer = private(path)
    number = writer.begin(Kind.BARRIER, group=1, view=1, sequence=1, enter_ns=1, members=1)
    assert _in_child(lambda: writer.finish(number, State.DONE, done_ns=2)) == 0
    (record,) = look(path).operations
    assert record.state is State.STARTED


def test_forked_child_of_a_worker_writes_nothing_once_its_session_disarmed_it(tmp_path: Path) -> None:
    path = str(tmp_path / "t")
    telemetry.create(path, 0, 1, 1)
    worker = TelemetryWriter(path)
    source = OperationsSource()
    source.offer(worker.operations)
    writer = source.writer({"ELASTIC_RUN_TELEMETRY": "/nowhere/file"})
    assert writer is source.writer({}) is worker.operations()
    writer.begin(Kind.BARRIER, group=1, view=1, sequence=1, enter_ns=1, members=1)

    def child() -> None:
        worker.disarm()
        writer.begin(Kind.BARRIER, group=1, view=1, sequence=2, enter_ns=1, members=1)
        worker.operations().begin(Kind.BARRIER, group=1, view=1, sequence=3, enter_ns=1, members=1)

    assert _in_child(child) == 0
    assert [record.sequence for record in look(path).operations] == [1]


def test_first_use_of_a_disarmed_worker_is_disarmed_too(tmp_path: Path) -> None:
    path = str(tmp_path / "t")
    telemetry.create(path, 0, 1, 1)
    worker = TelemetryWriter(path)
    worker.disarm()
    worker.operations().begin(Kind.BARRIER, group=1, view=1, sequence=1, enter_ns=1, members=1)
    assert look(path).operations_begun == 0


def test_without_a_file_records_are_kept_in_memory() -> None:
    source = OperationsSource()
    writer = source.writer({})
    assert writer is source.writer({})
    assert writer.begin(Kind.BARRIER, group=1, view=1, sequence=1, enter_ns=1, members=1) == 1


def test_path_takes_the_process_id_and_replaces_only_what_a_dead_process_left(tmp_path: Path) -> None:
    path = str(tmp_path / "t.%p")
    real = str(tmp_path / f"t.{os.getpid()}")
    private(path)
    assert look(real).operations_begun == 0
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}: put %p"):
        private(real)
    left = str(tmp_path / "left")
    with recording(left, "hang"):
        pass
    assert look(left).operations_begun == 4
    private(left)
    assert look(left).operations_begun == 0


@pytest.mark.parametrize("there", ["text", "folder", "nowhere"])
def test_what_is_no_telemetry_file_is_left_alone(tmp_path: Path, there: str) -> None:
    path = tmp_path / there
    if there == "text":
        path.write_text("mine")
    elif there == "folder":
        path.mkdir()
    else:
        path = tmp_path / "nowhere" / "file"
    with pytest.raises(UserError, match="ELASTIC_RUN_TELEMETRY"):
        private(str(path))
    assert there != "text" or path.read_text() == "mine"


def _await_begun(file: TelemetryFile, count: int) -> None:
    """Return as soon as `count` operations were begun: shared memory has no event, and a pause would miss the place."""
    ends_at_s = time.monotonic() + BOUND_S
    while file.read_operations(after=2**63).operations_begun < count:
        assert time.monotonic() < ends_at_s, f"not {count} operations within {BOUND_S} s"


def _in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked child; return its exit code."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
