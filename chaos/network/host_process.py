"""A process on a host of a laboratory: as subprocess.Popen, but `pid` and signals are those of the program itself.

The Popen inside is enter.py, which ends as the program ended; so `returncode`, `wait` and `communicate` keep their
meaning. The program is in a session of its own and dies with the laboratory, as does everything it starts.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from elastic_run.chaos.network import enter
from elastic_run.runtime.protocol.errors import ElasticError

START_S = 60.0
"""For an interpreter to start and enter the namespaces; more only delays the report of a machine far too busy."""
END_S = 10.0
"""For a killed program to be reaped."""
REPORT_BYTES = 4096
File = int | IO[Any] | None


class LabError(ElasticError):
    """The laboratory, or a process on it, could not do what was asked."""


class HostProcess:
    """Made by `start`. Text streams are UTF-8."""

    def __init__(self, wrapper: subprocess.Popen[str], *, host: str, pid: int) -> None:
        self.host = host
        self.pid = pid
        """As the caller's PID namespace numbers it."""
        self._wrapper = wrapper
        self.args = wrapper.args
        self.stdin, self.stdout, self.stderr = wrapper.stdin, wrapper.stdout, wrapper.stderr

    @property
    def returncode(self) -> int | None:
        """The exit code, minus the signal that ended it, or None before it was waited for."""
        return self._wrapper.returncode

    def poll(self) -> int | None:
        return self._wrapper.poll()

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for the end.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        return self._wrapper.wait(timeout_s)

    def communicate(self, text: str | None = None, timeout_s: float | None = None) -> tuple[str, str]:
        """Send text, read to the end, wait; see Popen.communicate. A stream that is no pipe reads as nothing."""
        out, err = self._wrapper.communicate(text, timeout_s)
        return out or "", err or ""

    def send_signal(self, number: int) -> None:
        """Signal the program, unless it has ended."""
        if self.poll() is None:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                return  # it ended just now; its wrapper is about to

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Kill, reap and close the pipes; nothing happens the second time."""
        self.kill()
        try:
            self._wrapper.wait(END_S)
        except subprocess.TimeoutExpired:  # someone stopped the wrapper itself; the program dies with it
            self._wrapper.kill()
            self._wrapper.wait()
        _close_streams(self._wrapper)


def start(  # one keyword per thing a process is given
    command: Sequence[str],
    *,
    host: str,
    namespace_fds: Sequence[int],
    env: Mapping[str, str] | None,
    cwd: str | Path | None,
    stdin: File,
    stdout: File,
    stderr: File,
) -> HostProcess:
    """Start a program in the namespaces and return once it runs.

    Raises:
        LabError: it could not be executed; the message says why.
    """
    environment = dict(os.environ if env is None else env)
    report_fd, write_fd = os.pipe()
    try:
        wrapper = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", enter.__file__, str(write_fd), ",".join(map(str, namespace_fds))),
                *(os.path.abspath(cwd or os.getcwd()), environment.get("LC_CTYPE", enter.UNSET), *command),
            ],
            env=environment,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            encoding="utf-8",
            pass_fds=(write_fd, *namespace_fds),
            start_new_session=True,
        )
    except OSError as error:
        os.close(report_fd)
        raise LabError(f"{sys.executable}: {error.strerror}") from error
    finally:
        os.close(write_fd)
    try:
        report = dict(line.partition(" ")[::2] for line in _read_report(report_fd).splitlines())
    finally:
        os.close(report_fd)
    if "failed" in report or "pid" not in report:
        wrapper.kill()  # the program, if there is one, dies with it
        wrapper.wait()
        _close_streams(wrapper)
        raise LabError(report.get("failed", f"{command[0]} did not start on {host} within {START_S:.0f} s"))
    return HostProcess(wrapper, host=host, pid=int(report["pid"]))


def _read_report(report_fd: int) -> str:
    """Read until the program was executed (which closes its end), or its start failed, or the time is over."""
    text, deadline_s = b"", time.monotonic() + START_S
    while len(text) < REPORT_BYTES:
        if not select.select([report_fd], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
            return ""
        part = os.read(report_fd, REPORT_BYTES)
        if not part:
            break
        text += part
    return text.decode(errors="replace")


def _close_streams(wrapper: subprocess.Popen[str]) -> None:
    for stream in (wrapper.stdin, wrapper.stdout, wrapper.stderr):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):  # what was buffered for the program is lost with it
                stream.close()
