"""The telemetry file: what was written is read; what is not such a file is refused."""

import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_run.runtime.edge import telemetry_layout as layout
from elastic_run.runtime.edge.telemetry import Telemetry, TelemetryFile, create
from elastic_run.runtime.edge.telemetry_layout import WORD_BYTES, Phase
from elastic_run.runtime.edge.telemetry_writer import TelemetryWriter
from elastic_run.runtime.protocol.errors import CodecError, InvariantViolated


@pytest.fixture
def path(tmp_path: Path) -> str:
    target = str(tmp_path / "telemetry")
    create(target, 3, 8, 5)
    return target


def read(path: str) -> Telemetry:
    file = TelemetryFile(path)
    try:
        return file.read()
    finally:
        file.close()


def set_word(path: str, position: int, value: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position * WORD_BYTES)
        file.write(struct.pack("=Q", value))


def test_fresh_file_is_private_and_says_only_what_the_agent_knows(path: str) -> None:
    found = read(path)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert (found.rank, found.world_size, found.view, found.pid) == (3, 8, 5, 0)
    assert found.phase is Phase.STARTING
    assert (found.step, found.records, found.step_rate_per_s(), found.age_s(10)) == (0, (), None, None)


def test_existing_file_is_not_overwritten(path: str) -> None:
    with pytest.raises(FileExistsError):
        create(path, 0, 1, 1)


def test_marks_of_the_worker_are_read_back(path: str) -> None:
    writer = TelemetryWriter(path)
    writer.begin(pid=77)
    writer.set_view(6)
    assert [writer.record_step(start, start + 40) for start in (100, 200, 300)] == [1, 2, 3]
    writer.park(3)
    found = read(path)
    assert (found.pid, found.view, found.phase, found.step, found.parked_at_step) == (77, 6, Phase.PARKED, 3, 3)
    assert [(r.step, r.start_ns, r.end_ns) for r in found.records] == [(1, 100, 140), (2, 200, 240), (3, 300, 340)]
    assert (found.step_end_ns, found.records_torn, found.records_overwritten) == (340, 0, 0)
    assert found.step_rate_per_s() == pytest.approx(1e9 / 100)
    assert found.age_s(found.change_ns + 2_000_000_000) == 2.0


def test_count_goes_on_when_the_file_is_mapped_again(path: str) -> None:
    TelemetryWriter(path).record_step(1, 2)
    assert TelemetryWriter(path).record_step(3, 4) == 2


def test_old_records_are_overwritten_and_counted(path: str) -> None:
    writer = TelemetryWriter(path)
    for step in range(1, layout.STEP_RECORDS + 11):
        writer.record_step(step, step)
    found = read(path)
    assert [r.step for r in found.records] == list(range(11, layout.STEP_RECORDS + 11))
    assert (found.records_overwritten, found.records_torn) == (10, 0)
    file = TelemetryFile(path)
    assert [r.step for r in file.read(records_max=2).records] == [layout.STEP_RECORDS + 9, layout.STEP_RECORDS + 10]
    assert file.read(records_max=2).records_overwritten == 10
    file.close()


def test_half_written_record_is_counted_not_returned(path: str) -> None:
    writer = TelemetryWriter(path)
    for step in (1, 2, 3):
        writer.record_step(step * 10, step * 10 + 5)
    set_word(path, layout.record_word(2) + 3, 27)
    found = read(path)
    assert [r.step for r in found.records] == [1, 3]
    assert found.records_torn == 1


def test_stop_request_reaches_the_worker_and_is_withdrawn(path: str) -> None:
    writer = TelemetryWriter(path)
    file = TelemetryFile(path)
    assert writer.stop_request() == (0, 0)
    file.request_stop(at_step=12, view=6)
    assert writer.stop_request() == (12, 6)
    assert (file.read().stop_at_step, file.read().requested_view) == (12, 6)
    file.withdraw_stop()
    assert writer.stop_request()[0] == 0
    with pytest.raises(InvariantViolated):
        file.request_stop(at_step=0, view=7)
    file.close()


def test_file_opened_to_read_only_is_not_written_and_may_be_a_link(path: str, tmp_path: Path) -> None:
    os.chmod(path, 0o400)
    os.symlink(path, tmp_path / "link")
    file = TelemetryFile(str(tmp_path / "link"), read_only=True)
    assert (file.read().rank, file.read_operations().operations) == (3, ())
    with pytest.raises(TypeError):
        file.beat()
    file.close()


def test_disarmed_writer_leaves_the_file_alone(path: str) -> None:
    writer = TelemetryWriter(path)
    writer.disarm()
    writer.record_step(1, 2)
    writer.set_phase(Phase.RUNNING)
    assert read(path).step == 0
    assert read(path).phase is Phase.STARTING


DAMAGES: dict[str, Callable[[str], None]] = {
    "empty": lambda path: os.truncate(path, 0),
    "truncated": lambda path: os.truncate(path, layout.FILE_BYTES - WORD_BYTES),
    "one byte longer": lambda path: os.truncate(path, layout.FILE_BYTES + 1),
    "huge": lambda path: os.truncate(path, layout.FILE_BYTES_MAX + WORD_BYTES),
    "magic": lambda path: set_word(path, layout.H_MAGIC, 1),
    "layout": lambda path: set_word(path, layout.H_LAYOUT, layout.LAYOUT - 1),
    "size in header": lambda path: set_word(path, layout.H_FILE_BYTES, layout.FILE_BYTES + 8),
    "ring capacity": lambda path: set_word(path, layout.H_STEPS_RECORDS, 1 << 40),
    "ring offset": lambda path: set_word(path, layout.H_STEPS_BYTE, 0),
    "operations length": lambda path: set_word(path, layout.H_OPERATIONS_BYTES, 8),
    "gone": os.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_anything_but_a_whole_file_of_this_layout_is_refused(path: str, damage: Callable[[str], None]) -> None:
    damage(path)
    with pytest.raises(CodecError):
        TelemetryFile(path)
    with pytest.raises(CodecError):
        TelemetryWriter(path)


@pytest.mark.parametrize("name", ["truncated", "magic", "layout", "ring offset"])
def test_damage_done_while_it_is_mapped_is_refused(path: str, name: str) -> None:
    file = TelemetryFile(path)
    DAMAGES[name](path)
    with pytest.raises(CodecError):
        file.read()
    with pytest.raises(CodecError):
        file.request_stop(at_step=1, view=9)
    file.close()


def test_unknown_phase_is_refused(path: str) -> None:
    set_word(path, layout.PHASE, len(Phase))
    with pytest.raises(CodecError, match="phase 6"):
        read(path)


def test_symbolic_link_is_refused(path: str, tmp_path: Path) -> None:
    os.symlink(path, tmp_path / "link")
    with pytest.raises(CodecError):
        TelemetryFile(str(tmp_path / "link"))
