"""What is known about a worker's failure, and which failure of several was the first.

A worker may have left an error file (torch elastic's format, written by `record` or by our bootstrap). It comes from
the user's process, so its content is bounded, checked and cleaned before anything is made of it.

Invariants (tests/unit/test_failure.py):
1. No error file, whatever it holds or is, raises, blocks, or yields text beyond the bounds or with control characters.
2. Workers that ended after they were told to stop are never the first failure.
3. An error recorded before a worker's exit counts from when it was recorded: the process may have taken long to end.
Not here: watching workers (workers.py); deciding what a failure costs (the controller).
"""

import datetime
import errno
import json
import math
import os
import signal
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from elastic_run.runtime.edge.process import Exit
from elastic_run.runtime.protocol.ids import NodeId
from elastic_run.runtime.protocol.messages import Failure

ERROR_FILE_BYTES_MAX = 4 << 20
"""Larger files are not parsed: only a script gone wrong writes megabytes of message."""
MESSAGE_CHARS_MAX = 1024
TRACEBACK_CHARS_MAX = 16 << 10
TRACEBACK_HEAD_CHARS = 4 << 10
"""A longer traceback keeps this much of its start; the rest of the allowance is its end, where the error is named."""
CLOCK_SLACK_S = 1.5
"""Error files carry whole seconds, so a true time may look this much too early."""
RENDERED_MAX = 16
"""Failures printed in full besides the first."""
BORDER_CHARS = 60
_NONE = "<none>"


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorReport:
    """What an error file says."""

    message: str
    traceback: str
    recorded_unix_s: float | None
    """When the error was recorded, as exactly as the file tells; None when it does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerIdentity:
    node: NodeId
    host: str
    rank: int
    local_rank: int
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How and when a worker ended. `_s` are monotonic seconds of this host, `_unix_s` its wall clock."""

    exit: Exit
    started_unix_s: float
    exited_unix_s: float
    exited_s: float
    stop_began_s: float | None
    """When its group was told to stop; None if it was not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFailure:
    """The end of one worker that was not a success."""

    node: NodeId
    host: str
    rank: int
    local_rank: int
    pid: int
    exit_code: int | None
    signal: int | None
    message: str
    traceback: str
    error_file: str | None
    failed_s: float
    """Monotonic seconds of this host."""
    failed_unix_s: float
    """For people only."""
    stopped: bool
    """It ended because its group was told to stop: a consequence, never a cause."""

    def as_message(self, now_s: float) -> Failure:
        """Return the form sent to the controller; `now_s` is the monotonic time of sending."""
        return Failure(
            node=self.node,
            rank=self.rank,
            local_rank=self.local_rank,
            pid=self.pid,
            exit_code=self.exit_code,
            signal=self.signal,
            message=self.message,
            traceback=self.traceback,
            age_s=max(0.0, now_s - self.failed_s),
        )


def worker_failure(
    worker: WorkerIdentity, ending: Ending, report: ErrorReport | None, error_file: str | None = None
) -> WorkerFailure:
    """Return the record of an end that was not a success; `error_file`: where the file stays to be read, if it does."""
    lead_s = _lead_s(ending, report)
    failed_s = ending.exited_s - lead_s
    stopped = ending.stop_began_s is not None and failed_s >= ending.stop_began_s
    return WorkerFailure(
        node=worker.node,
        host=worker.host,
        rank=worker.rank,
        local_rank=worker.local_rank,
        pid=worker.pid,
        exit_code=ending.exit.code,
        signal=ending.exit.signal,
        message=report.message if report else _message(ending.exit, stopped),
        traceback=report.traceback if report else "",
        error_file=error_file if report else None,
        failed_s=failed_s,
        failed_unix_s=ending.exited_unix_s - lead_s,
        stopped=stopped,
    )


def first_failure(failures: Sequence[WorkerFailure]) -> WorkerFailure | None:
    """Return the earliest failure of one host that is a cause; None when all were told to stop."""
    causes = [failure for failure in failures if not failure.stopped]
    return min(causes, key=lambda failure: (failure.failed_s, failure.rank), default=None)


def render(title: str, failures: Sequence[WorkerFailure]) -> str:
    """Return the report of failures under `title`, like torchrun's but the root cause first; of none, an empty text."""
    if not failures:
        return ""
    first = first_failure(failures)
    others = sorted((f for f in failures if f is not first), key=lambda f: (f.failed_s, f.rank))
    lines = ["=" * BORDER_CHARS, title, "-" * BORDER_CHARS]
    if first is not None:
        lines += ["Root cause (first observed failure):", _rendered(0, first), "-" * BORDER_CHARS]
    lines.append("Other failures:")
    lines += [_rendered(i, failure) for i, failure in enumerate(others[:RENDERED_MAX], 1)] or [f"  {_NONE}"]
    if len(others) > RENDERED_MAX:
        lines.append(f"  and {len(others) - RENDERED_MAX} more")
    return "\n".join([*lines, "=" * BORDER_CHARS])


def read_error_file(path: str) -> ErrorReport | None:
    """Return what an error file says; None when there is none. One that cannot be used yields a report saying so."""
    try:
        # Without O_NONBLOCK a FIFO put in its place would block us for ever.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        return None if error.errno in (errno.ENOENT, errno.ENOTDIR) else _unusable(str(error.strerror))
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return _unusable("not a regular file")
        if status.st_size > ERROR_FILE_BYTES_MAX:
            return _unusable(f"{status.st_size} bytes, over the limit of {ERROR_FILE_BYTES_MAX}")
        data = os.read(fd, ERROR_FILE_BYTES_MAX)
    except OSError as error:
        return _unusable(str(error.strerror))
    finally:
        os.close(fd)
    return parse_error_file(data, written_unix_s=status.st_mtime) if data else None


def parse_error_file(data: bytes, *, written_unix_s: float) -> ErrorReport:
    """Return what the bytes of an error file say; `written_unix_s` is the file's own time of change."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return _unusable("not JSON")
    message = document.get("message") if isinstance(document, dict) else None
    if isinstance(message, str):
        return ErrorReport(
            message=clean(message, MESSAGE_CHARS_MAX),
            traceback="",
            recorded_unix_s=_recorded_unix_s(document.get("timestamp"), written_unix_s),
        )
    if not isinstance(message, dict):
        return _unusable("without a message")
    extra = message.get("extraInfo")
    extra = extra if isinstance(extra, dict) else {}
    text, stack = message.get("message"), extra.get("py_callstack")
    return ErrorReport(
        message=clean(text, MESSAGE_CHARS_MAX) if isinstance(text, str) else "the error file names no message",
        traceback=clean(stack, TRACEBACK_CHARS_MAX, head_chars=TRACEBACK_HEAD_CHARS) if isinstance(stack, str) else "",
        recorded_unix_s=_recorded_unix_s(extra.get("timestamp"), written_unix_s),
    )


def clean(text: str, chars_max: int, *, head_chars: int | None = None) -> str:
    """Return text of at most `chars_max` characters that is safe to print and to encode.

    With `head_chars`, what is too long loses its middle instead of its end.
    """
    if len(text) > chars_max:
        mark = "\n[...]\n" if head_chars else "[...]"
        kept = chars_max - len(mark)
        head = head_chars if head_chars else kept
        text = text[:head] + mark + (text[len(text) - (kept - head) :] if kept > head else "")
    text = text.encode(errors="replace").decode()  # JSON may smuggle in lone surrogates
    return "".join(c if c in "\n\t" or c.isprintable() else "?" for c in text)


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have no name
        return f"signal {number}"


def _unusable(why: str) -> ErrorReport:
    return ErrorReport(
        message=f"the worker left an error file that cannot be used: {why}", traceback="", recorded_unix_s=None
    )


def _recorded_unix_s(stamp: Any, written_unix_s: float) -> float | None:
    """The stamp has whole seconds; the file's time of change refines it when the two agree."""
    if isinstance(stamp, bool) or not isinstance(stamp, int | float | str):
        return None
    try:
        seconds = float(stamp)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(seconds):
        return None
    return written_unix_s if 0 <= written_unix_s - seconds <= CLOCK_SLACK_S else seconds


def _lead_s(ending: Ending, report: ErrorReport | None) -> float:
    """Seconds between the recorded error and the exit; 0 when there is no record, or no plausible one."""
    if report is None or report.recorded_unix_s is None:
        return 0.0
    if not ending.started_unix_s - CLOCK_SLACK_S <= report.recorded_unix_s <= ending.exited_unix_s + CLOCK_SLACK_S:
        return 0.0
    return max(0.0, ending.exited_unix_s - report.recorded_unix_s)


def _message(exit_: Exit, stopped: bool) -> str:
    if stopped:
        return f"{exit_}, after it was told to stop"
    if exit_.signal is not None:
        return f"Signal {exit_.signal} ({signal_name(exit_.signal)}) received"
    return f"{exit_}; no traceback was recorded"


def _rendered(index: int, failure: WorkerFailure) -> str:
    if failure.signal is None:
        code = f"{failure.exit_code} (pid: {failure.pid})"
    else:
        code = f"{-failure.signal} (pid: {failure.pid}) ({signal_name(failure.signal)})"
    at = datetime.datetime.fromtimestamp(failure.failed_unix_s).isoformat(sep="_", timespec="milliseconds")
    detail = (failure.traceback or failure.message).rstrip("\n").replace("\n", "\n  ")
    return "\n".join(
        [
            f"[{index}]:",
            f"  time      : {at}",
            f"  host      : {failure.host} (node: {failure.node})",
            f"  rank      : {failure.rank} (local_rank: {failure.local_rank})",
            f"  exitcode  : {code}",
            f"  error_file: {failure.error_file or _NONE}",
            f"  traceback : {detail}",
        ]
    )
