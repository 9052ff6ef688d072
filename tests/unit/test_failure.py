"""Records of failed workers, from exits and from whatever lies where the error file should."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from elastic_run.agent import failure
from elastic_run.agent.failure import Ending, ErrorReport, WorkerFailure, WorkerIdentity
from elastic_run.runtime.edge.process import Exit
from elastic_run.runtime.protocol.ids import NodeId

START_UNIX_S = 1_700_000_000.0
CODE_3 = Exit(code=3, signal=None)
SIGSEGV = Exit(code=None, signal=11)
SIGTERM = Exit(code=None, signal=15)


def failed(
    exit_: Exit = CODE_3,
    *,
    rank: int = 0,
    after_s: float = 10.0,
    stop_after_s: float | None = None,
    report: ErrorReport | None = None,
) -> WorkerFailure:
    """A worker started at monotonic 100 that ended `after_s` seconds later."""
    ending = Ending(
        exit=exit_,
        started_unix_s=START_UNIX_S,
        exited_unix_s=START_UNIX_S + after_s,
        exited_s=100.0 + after_s,
        stop_began_s=None if stop_after_s is None else 100.0 + stop_after_s,
    )
    worker = WorkerIdentity(node=NodeId("n0"), host="h", rank=rank, local_rank=rank, pid=1000 + rank)
    return failure.worker_failure(worker, ending, report, "/logs/error.json")


def raised(recorded_after_s: float | None, message: str = "ValueError: x") -> ErrorReport:
    recorded = None if recorded_after_s is None else START_UNIX_S + recorded_after_s
    return ErrorReport(message=message, traceback="Traceback\n  ValueError: x\n", recorded_unix_s=recorded)


def document(message: object, **top: object) -> bytes:
    return json.dumps({"message": message, **top}).encode()


def torch_document(timestamp: object) -> bytes:
    return document({"message": "E: x", "extraInfo": {"py_callstack": "Tr\n  E: x", "timestamp": timestamp}})


def test_an_exit_without_an_error_file_is_described_by_its_code_or_signal() -> None:
    assert failed(CODE_3).message == "exited with code 3; no traceback was recorded"
    assert failed(SIGSEGV).message == "Signal 11 (SIGSEGV) received"
    assert failed(SIGTERM, stop_after_s=9.0).message == "was killed by SIGTERM, after it was told to stop"
    assert failed(Exit(code=None, signal=40)).message == "Signal 40 (signal 40) received"
    assert failed(CODE_3).error_file is None


def test_the_first_failure_is_the_one_recorded_first_not_the_one_reaped_first() -> None:
    slow_to_end = failed(rank=1, after_s=12.0, report=raised(10.0))
    victim = failed(rank=0, after_s=10.5)
    assert failure.first_failure([victim, slow_to_end]) is slow_to_end


@pytest.mark.parametrize("implausible", [-5.0, 1e9, None])
def test_an_implausible_time_in_the_error_file_gives_way_to_the_exit(implausible: float | None) -> None:
    liar = failed(rank=1, after_s=12.0, report=raised(implausible))
    assert failure.first_failure([failed(rank=0, after_s=10.5), liar]).rank == 0  # type: ignore[union-attr]
    assert liar.failed_s == 112.0


def test_workers_told_to_stop_are_never_the_cause() -> None:
    stopped = failed(SIGTERM, rank=0, after_s=5.0, stop_after_s=4.0)
    crashed_while_stopping = failed(SIGSEGV, rank=1, after_s=6.0, stop_after_s=4.0)
    cause = failed(rank=2, after_s=9.0, stop_after_s=4.0, report=raised(3.9))
    assert failure.first_failure([stopped, crashed_while_stopping]) is None
    assert failure.first_failure([stopped, crashed_while_stopping, cause]) is cause


def test_equal_times_are_decided_by_rank() -> None:
    assert failure.first_failure([failed(rank=2), failed(rank=1)]).rank == 1  # type: ignore[union-attr]
    assert failure.first_failure([]) is None


def test_the_message_to_the_controller_carries_an_age_and_no_clock() -> None:
    message = failed(report=raised(9.5)).as_message(now_s=112.0)
    assert message.age_s == pytest.approx(2.5)
    assert (message.exit_code, message.signal, message.rank, message.pid) == (3, None, 0, 1000)
    assert failed().as_message(now_s=0.0).age_s == 0.0


@pytest.mark.parametrize("stamp", [str(int(START_UNIX_S)), int(START_UNIX_S), START_UNIX_S])
def test_whole_second_stamps_are_refined_by_the_files_own_time(stamp: object) -> None:
    report = failure.parse_error_file(torch_document(stamp), written_unix_s=START_UNIX_S + 0.7)
    assert report == ErrorReport(message="E: x", traceback="Tr\n  E: x", recorded_unix_s=START_UNIX_S + 0.7)
    touched_later = failure.parse_error_file(torch_document(stamp), written_unix_s=START_UNIX_S + 50)
    assert touched_later.recorded_unix_s == START_UNIX_S


@pytest.mark.parametrize("stamp", [None, True, "", "x", "nan", "inf", [], {}, 10**400, "9" * 5000])
def test_stamps_that_are_no_time_are_no_time(stamp: object) -> None:
    data = torch_document(stamp)
    assert failure.parse_error_file(data, written_unix_s=START_UNIX_S).recorded_unix_s is None


def test_a_plain_string_message_is_understood() -> None:
    report = failure.parse_error_file(document("boom", timestamp=5), written_unix_s=START_UNIX_S)
    assert report == ErrorReport(message="boom", traceback="", recorded_unix_s=5.0)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff",
        b"{",
        b"[]",
        b"null",
        b"7",
        b"{}",
        b"[" * 100_000,
        b"9" * 5000,
        document(None),
        document([]),
        document({}),
        document({"message": 1, "extraInfo": 2}),
        document({"message": "m", "extraInfo": {"py_callstack": ["x"], "timestamp": {}}}),
    ],
)
def test_hostile_content_yields_a_report_and_nothing_else(data: bytes) -> None:
    report = failure.parse_error_file(data, written_unix_s=0.0)
    assert report.message and not report.traceback and report.recorded_unix_s is None


def test_text_is_bounded_and_cannot_drive_a_terminal() -> None:
    stack = "first line\n" + "x" * 100_000 + "\nlast line"
    data = document({"message": "\x1b[2J\x07\ud800" + "m" * 5000, "extraInfo": {"py_callstack": stack}})
    report = failure.parse_error_file(data, written_unix_s=0.0)
    assert report.message.startswith("?[2J??mmm") and report.message.endswith("[...]")
    assert len(report.message) == failure.MESSAGE_CHARS_MAX
    assert len(report.traceback) == failure.TRACEBACK_CHARS_MAX
    assert report.traceback.startswith("first line\n") and report.traceback.endswith("\nlast line")
    report.message.encode()


def test_what_is_no_regular_file_of_bounded_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "error.json"
    assert failure.read_error_file(str(path)) is None
    path.touch()
    assert failure.read_error_file(str(path)) is None
    os.truncate(path, failure.ERROR_FILE_BYTES_MAX + 1)
    assert "over the limit" in failure.read_error_file(str(path)).message  # type: ignore[union-attr]
    path.unlink()
    os.mkfifo(path)
    assert "not a regular file" in failure.read_error_file(str(path)).message  # type: ignore[union-attr]
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "cannot be used" in failure.read_error_file(str(path)).message  # type: ignore[union-attr]
    path.unlink()
    path.mkdir()
    assert "cannot be used" in failure.read_error_file(str(path)).message  # type: ignore[union-attr]


def test_the_report_names_the_root_cause_first() -> None:
    cause = failed(SIGSEGV, rank=3, after_s=1.0)
    raised_later = failed(rank=1, after_s=2.0, report=raised(2.0))
    text = failure.render("train.py FAILED", [raised_later, cause])
    first, others = text.split("Other failures:")
    assert text.splitlines()[1] == "train.py FAILED"
    assert "rank      : 3 (local_rank: 3)" in first and "exitcode  : -11 (pid: 1003) (SIGSEGV)" in first
    assert "host      : h (node: n0)" in first and "error_file: <none>" in first
    assert "exitcode  : 3 (pid: 1001)" in others and "error_file: /logs/error.json" in others
    assert "traceback : Traceback\n    ValueError: x" in others


def test_a_long_list_of_failures_is_cut_and_an_empty_one_says_nothing() -> None:
    many = [dataclasses.replace(failed(), rank=rank) for rank in range(failure.RENDERED_MAX + 11)]
    assert "and 10 more" in failure.render("x", many)
    assert failure.render("x", []) == ""
    assert "<none>" in failure.render("x", many[:1])
