"""Runs the real `elastic-run` and `elastic-ctl` for tests, and finds every process that came of them.

A bench has a run-directory root and a temporary directory of its own. Whatever it starts carries a mark in its
environment, which children inherit into any session or group, so that nothing can hide.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

BOUND_S = 60.0
POLL_S = 0.02
MARK = "LAUNCH_BENCH_MARK"  # agents hand down nothing that begins with ELASTIC_RUN
SCRIPTS = Path(__file__).parent / "scripts"
AGENT, CONTROLLER = "elastic_run.agent.cli", "elastic_run.controller.cli"


def wait_until(holds: Callable[[], bool], what: str) -> None:
    ends_at_s = time.monotonic() + BOUND_S
    while not holds():
        assert time.monotonic() < ends_at_s, f"not within {BOUND_S:g} s: {what}"
        time.sleep(POLL_S)


def free_port_pair() -> int:
    """A port that is free, as is the next one."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


class Launched:
    """A started `elastic-run`. Its stderr is read as it comes, its stdout lies in a file."""

    def __init__(self, argv: list[str], env: dict[str, str], stdout: Path, cwd: Path) -> None:
        self.stdout_file = stdout
        with stdout.open("wb") as output:
            self.process = subprocess.Popen(argv, env=env, cwd=cwd, stdout=output, stderr=subprocess.PIPE)
        self.err = ""
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def out(self) -> str:
        return self.stdout_file.read_text()

    @property
    def said(self) -> list[str]:
        """The launcher's and the agent's own lines."""
        return [line for line in self.err.splitlines() if line.startswith("elastic-run: ")]

    def until(self, text: str) -> None:
        """Wait until `text` stands on stderr."""
        with self._news:
            found = self._news.wait_for(lambda: text in self.err, BOUND_S)
        assert found, f"no {text!r} in {self.err!r}"

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Wait for the exit code, and for all output."""
        code = self.process.wait(BOUND_S)
        self._reader.join(BOUND_S)
        assert not self._reader.is_alive(), "something still holds stderr"
        return code

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stderr:
            while chunk := os.read(stderr.fileno(), 65536):
                with self._news:
                    self.err += chunk.decode(errors="replace")
                    self._news.notify_all()


class Bench:
    """Use as a context: at its end everything it started is dead, by force if need be, and its directory is gone."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(dir="/tmp", prefix="elb"))
        self.root = self.path / "r"
        self.files = self.path / "files"
        self.files.mkdir()
        (self.path / "tmp").mkdir()
        self._mark = uuid.uuid4().hex
        self._count = 0
        inherited = {n: value for n, value in os.environ.items() if not n.startswith(("PET_", "TORCHELASTIC"))}
        self.env = {
            **inherited,
            MARK: self._mark,
            "ELASTIC_RUN_DIR": str(self.root),
            "TMPDIR": str(self.path / "tmp"),
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *argv: object, **env: str) -> Launched:
        """Start `elastic-run` with two workers unless the arguments say otherwise."""
        self._count += 1
        return Launched(self.command(*argv), self.env | env, self.path / f"stdout-{self._count}", self.files)

    def command(self, *argv: object) -> list[str]:
        return [sys.executable, "-m", "elastic_run.runtime.cli", "--nproc-per-node=2", *map(str, argv)]

    def ctl(self, *argv: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "elastic_run.runtime.ctl.cli", *map(str, argv)]
        return subprocess.run(
            command,
            env=self.env,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=BOUND_S,
            check=False,
        )

    def ask(self, *argv: object) -> dict[str, Any]:
        """The JSON answer of `elastic-ctl`."""
        result = self.ctl(*argv, "--json")
        assert result.returncode == 0, result.stderr
        answer: dict[str, Any] = json.loads(result.stdout)
        return answer

    def processes(self, program: str = "") -> list[int]:
        """Pids of everything alive that was started here, whatever became of its parents; of one program if named."""
        found = []
        for name in os.listdir("/proc"):
            if name.isdecimal():
                try:
                    environ = Path(f"/proc/{name}/environ").read_bytes()
                    command = Path(f"/proc/{name}/cmdline").read_bytes()
                except (FileNotFoundError, ProcessLookupError, PermissionError):  # gone, or not ours
                    continue
                # exec_wrapper.py becomes the program in a moment, and names it already
                if f"{MARK}={self._mark}".encode() in environ.split(b"\0") and program.encode() in command:
                    found.append(int(name))
        return found

    def process(self, program: str) -> int:
        """The one process that runs `program`, waited for."""
        wait_until(lambda: len(self.processes(program)) == 1, f"one process {program}")
        return self.processes(program)[0]

    def assert_nothing_left(self) -> None:
        """No process, and no run directory."""
        assert self.processes() == []
        assert not self.root.exists() or list(self.root.iterdir()) == []

    def await_files(self, *names: str) -> None:
        """Wait for files that scripts make in `files`."""
        wait_until(lambda: all((self.files / name).exists() for name in names), f"files {names}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        def kill_left() -> bool:
            left = self.processes()
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            return not left

        wait_until(kill_left, "the end of what tests left")
        shutil.rmtree(self.path)
