"""`elastic-ctl telemetry dump` on files of live, dead and strange origin."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastic_run.runtime.ctl import telemetry_dump
from elastic_run.runtime.ctl.cli import main
from elastic_run.runtime.edge import telemetry, telemetry_layout
from elastic_run.runtime.edge.operations_codes import Algorithm, Dtype, Kind, Reduction, State
from elastic_run.runtime.edge.telemetry_layout import Phase
from elastic_run.runtime.edge.telemetry_writer import TelemetryWriter
from elastic_run.runtime.protocol.errors import UserError

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "record_operations.py"
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "telemetry.md"
BOUND_S = 60
T = 10**12


def made(path: Path) -> str:
    """A worker's file with two steps, an operation that ended, one that was aborted, and one that hangs."""
    telemetry.create(str(path), 3, 8, 5)
    worker = TelemetryWriter(str(path))
    worker.begin(pid=0)
    worker.record_step(T, T + 20_000_000)
    worker.record_step(T + 100_000_000, T + 130_000_000)
    writer = worker.operations()
    writer.group(7, "dp\n\x1b[31m")
    root, dead = writer.peer("w-root"), writer.peer("w-dead")
    for sequence, state in enumerate([State.DONE, State.ABORTED, State.STARTED], start=40):
        number = writer.begin(
            Kind.REDUCE,
            group=7,
            view=5,
            sequence=sequence,
            enter_ns=T + sequence,
            members=4,
            nbytes=3 << 20,
            reduction=Reduction.AVG,
            dtype=Dtype.BFLOAT16,
            algorithm=Algorithm.RING,
            partner=root,
        )
        writer.transfer(
            number,
            dead,
            sent_bytes=1 << 20,
            received_bytes=0,
            send_blocked_ns=5_000,
            receive_blocked_ns=2_500_000,
            progress_ns=T + 7_000_000_000,
        )
        if state is State.STARTED:
            writer.update(number, first_sent_ns=T + sequence + 1500, moved_bytes=9)
        else:
            culprit = {"culprit": dead} if state is State.ABORTED else {}
            writer.finish(number, state, done_ns=T + 3_000_000 + sequence, **culprit)
    worker.set_phase(Phase.RUNNING)
    return str(path)


def dump(path: str, *flags: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "elastic_run.runtime.ctl.cli", "telemetry", "dump", path, *flags],
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_people_are_told_of_the_worker_its_steps_and_what_it_is_in_the_middle_of(tmp_path: Path) -> None:
    path = made(tmp_path / "t")
    before = Path(path).read_bytes()
    code, out, err = dump(path)
    assert (code, err) == (0, "")
    assert "rank 3 of 8 in view 5; no process has begun" in out
    assert "2 finished, 9.09 a second" in out
    assert "3 recorded, 1 under way" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line[:1].isdecimal() and "reduce" in line}
    assert "reduce avg bfloat16 ring with w-root" in rows["1"] and "done" in rows["1"] and "+3 ms" in rows["1"]
    assert "aborted" in rows["2"] and rows["2"].endswith("w-dead")
    assert "started" in rows["3"] and "+1.5 us" in rows["3"] and "3 MiB" in rows["3"]
    traffic = out[out.index("traffic of the operations under way") :].splitlines()[2:]
    assert [line.split()[:2] for line in traffic] == [["3", "w-dead"]]
    assert "5 us" in traffic[0] and "2.5 ms" in traffic[0]
    assert "\x1b" not in out
    assert Path(path).read_bytes() == before


def test_last_limits_steps_and_ended_operations_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = made(tmp_path / "t")
    assert main(["telemetry", "dump", path, "--last", "0"]) == 0
    out = capsys.readouterr().out
    assert "STEP" not in out
    assert [line.split()[1] for line in out.splitlines() if "reduce" in line] == ["started"]
    with pytest.raises(SystemExit, match="2"):
        main(["telemetry", "dump", path, "--last", "-1"])


def test_json_has_the_documented_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["telemetry", "dump", made(tmp_path / "t"), "--json", "--last", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    text = DOCUMENT.read_text()
    described = dict(line[2:].split("`: ") for line in text[text.index("## JSON") :].splitlines() if "`: " in line[:16])
    for part in ("worker", "counts"):
        assert list(found[part]) == described[f"`{part}"].split()
    assert list(found["steps"][0]) == described["`steps"].split()
    assert set(found) == {"file", "alive", "at_ns", "worker", "steps", "counts", "operations", "transfers"}
    assert [step["step"] for step in found["steps"]] == [1, 2]
    assert [record["state"] for record in found["operations"]] == ["done", "aborted", "started"]
    aborted = found["operations"][1]
    assert (aborted["culprit"], aborted["partner"], aborted["group"]) == ("w-dead", "w-root", "dp\n\x1b[31m")
    assert found["operations"][0]["culprit"] is None
    assert [(t["operation"], t["peer"], t["sent_bytes"]) for t in found["transfers"]] == [
        (number, "w-dead", 1 << 20) for number in (1, 2, 3)
    ]


def test_live_and_then_killed_worker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "t")
    environment = {**os.environ, "ELASTIC_RUN_TELEMETRY": path}
    process = subprocess.Popen([sys.executable, SCRIPT, "hang"], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert main(["telemetry", "dump", path]) == 0
        alive = capsys.readouterr().out
    finally:
        process.kill()
        process.communicate(timeout=BOUND_S)
    assert f"without an agent; process {process.pid}, alive" in alive
    assert "ages refer  to now" in alive
    assert main(["telemetry", "dump", path]) == 0
    dead = capsys.readouterr().out
    assert f"process {process.pid}, gone" in dead
    assert "4 recorded, 1 under way" in alive and "4 recorded, 1 under way" in dead


STRANGE: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "empty": lambda path: path.touch(),
    "text": lambda path: path.write_text("hello " * 100),
    "folder": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
    "zeros": lambda path: path.write_bytes(bytes(telemetry_layout.FILE_BYTES)),
    "truncated": lambda path: os.truncate(made(path), telemetry_layout.FILE_BYTES // 2),
    "earlier layout": lambda path: _set_word(made(path), telemetry_layout.H_LAYOUT, 1),
    "other table": lambda path: _set_word(made(path), telemetry_layout.STEPS_END_BYTE // 8 + 1, 5),
}


def _set_word(path: str, position: int, value: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position * telemetry_layout.WORD_BYTES)
        file.write(value.to_bytes(8, sys.byteorder))


@pytest.mark.parametrize("make", STRANGE.values(), ids=STRANGE.keys())
def test_what_is_no_telemetry_file_is_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], object]
) -> None:
    path = tmp_path / "t"
    make(path)
    assert main(["telemetry", "dump", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"elastic-ctl: {path}") and len(err.splitlines()) == 1


@given(
    pieces=st.lists(
        st.tuples(
            st.integers(64, telemetry_layout.FILE_BYTES // 8 - 1) | st.integers(16, 34) | st.integers(0, 40),
            st.integers(0, 2**64 - 1),
        ),
        min_size=1,
        max_size=20,
    )
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_refused_or_dumped(tmp_path: Path, pieces: list[tuple[int, int]]) -> None:
    path = tmp_path / "t"
    path.unlink(missing_ok=True)
    made(path)
    for position, value in pieces:
        _set_word(str(path), position, value)
    try:
        found = telemetry_dump.read(str(path), now_ns=T)
    except UserError:
        return
    assert json.dumps(telemetry_dump.document(found))
    assert telemetry_dump.readable(found, last=300)
