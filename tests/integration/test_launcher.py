"""Supervision with small programs in the places of agent and controller, and the command itself as a process."""

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from elastic_run.runtime.edge.process import Exit
from elastic_run.runtime.launcher import (
    CONTROLLER_EXIT_FOREIGN_STORE,
    EXIT_FAILED,
    EXIT_SIGNAL_BASE,
    EXIT_USAGE,
    verdict_of,
)
from elastic_run.runtime.restart_budget import RESTARTS_MAX

BOUND_S = 60.0
# Every line is one write(), so that lines of several processes never mix, even under PYTHONUNBUFFERED.
HARNESS = """
    import asyncio, os, sys
    from elastic_run.runtime.launcher import Children, Launcher

    class Store:
        async def keep(self):
            await asyncio.Event().wait()
        async def linger(self, own_pids):
            pass
        async def stop(self):
            os.write(1, b"store stopped\\n")

    async def assemble():
        if sys.argv[3] == "slow":
            os.write(1, b"assembling\\n")
            await asyncio.sleep(600)
        controller = (sys.executable, "-S", "-c", sys.argv[2]) if sys.argv[2] else None
        return Children(agent=(sys.executable, "-S", "-c", sys.argv[1]), controller=controller)

    async def main():
        launcher = Launcher(
            assemble=assemble, store=Store(), env=dict(os.environ),
            say=lambda text: os.write(1, f"said {text}\\n".encode()),
            drain_s=float(sys.argv[4]), sole_controller=sys.argv[3] != "shared",
        )
        return await launcher.run()

    sys.exit(asyncio.run(main()))
"""
WAITS = "import os, time; os.write(1, b'controller\\n'); time.sleep(600)"
AGENT_WAITS = """
import os, signal, sys, time
def on(number, frame):
    os.write(1, f"agent got {signal.Signals(number).name}\\n".encode())
    sys.exit(3)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, on)
os.write(1, b"agent %d\\n" % os.getpid())
time.sleep(600)
"""
AGENT_DEAF = """
import os, signal, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
os.write(1, b"agent %d\\n" % os.getpid())
time.sleep(600)
"""
AGENT_WITH_STRAY = """
import os, signal, time
pid = os.fork()
if pid == 0:
    os.setsid()
    time.sleep(600)
os.write(1, b"stray %d\\n" % pid)
os.kill(os.getpid(), signal.SIGKILL)
"""


class Run:
    """A launcher as a process; its lines are read as they come."""

    started: ClassVar[list["Run"]] = []

    def __init__(self, agent: str, controller: str = "", *, mode: str = "", drain_s: float = BOUND_S) -> None:
        argv = [sys.executable, "-c", textwrap.dedent(HARNESS), agent, controller, mode, str(drain_s)]
        reader, writer = os.pipe()
        self.process = subprocess.Popen(argv, stdout=writer)
        os.close(writer)
        self._reader = reader
        self._text = b""
        self._taken = 0
        Run.started.append(self)

    @property
    def lines(self) -> list[str]:
        return self._text.decode().split("\n")[:-1]

    def until(self, start: str) -> str:
        """Return the next line that begins so."""
        while True:
            for number, line in enumerate(self.lines[self._taken :], self._taken + 1):
                if line.startswith(start):
                    self._taken = number
                    return line
            if not self._read():
                self.process.kill()
                raise AssertionError(f"no line {start!r} in {self.lines}")

    def end(self) -> int:
        """Return the exit code once every process that writes here is gone."""
        while self._read():
            pass
        os.close(self._reader)
        code = self.process.wait(BOUND_S)
        assert self.lines[-1] == "store stopped"
        return code

    def _read(self) -> bytes:
        """Read what comes next; empty at the end, and when nothing comes within the bound."""
        part = os.read(self._reader, 65536) if select.select([self._reader], [], [], BOUND_S)[0] else b""
        self._text += part
        return part


@pytest.fixture(autouse=True)
def no_launcher_left() -> Iterator[None]:
    yield
    for run in Run.started:
        run.process.kill()  # and with it, by their parent-death signal, its children
        run.process.wait(BOUND_S)
    Run.started.clear()


def gone(pid: int) -> bool:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], BOUND_S)[0])
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("code", [0, 1, 7, 130])
def test_the_agents_exit_code_is_the_jobs(code: int) -> None:
    assert Run(f"raise SystemExit({code})", WAITS).end() == code


def test_without_a_controller_of_its_own_the_job_runs_too() -> None:
    assert Run("raise SystemExit(0)").end() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_the_agent_and_names_the_exit_code(number: signal.Signals) -> None:
    run = Run(AGENT_WAITS, WAITS)
    run.until("agent ")
    run.process.send_signal(number)
    assert run.end() == EXIT_SIGNAL_BASE + number
    assert run.lines.count(f"agent got {number.name}") == 1


def test_a_second_ctrl_c_kills_a_deaf_agent() -> None:
    run = Run(AGENT_DEAF, WAITS)
    pid = int(run.until("agent ").split()[1])
    run.process.send_signal(signal.SIGINT)
    run.until("said SIGINT received")
    run.process.send_signal(signal.SIGINT)
    assert run.end() == EXIT_SIGNAL_BASE + signal.SIGINT
    assert gone(pid)


def test_a_deaf_agent_is_killed_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    short = HARNESS.replace(
        "from elastic_run", "import elastic_run.runtime.launcher as l; l.DRAIN_MARGIN_S = 0\n    from elastic_run", 1
    )
    monkeypatch.setattr(sys.modules[__name__], "HARNESS", short)
    run = Run(AGENT_DEAF, WAITS, drain_s=0.05)
    pid = int(run.until("agent ").split()[1])
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == EXIT_SIGNAL_BASE + signal.SIGTERM
    assert gone(pid)
    assert any("did not end within" in line for line in run.lines)


def test_a_signal_before_the_children_start_ends_the_run() -> None:
    run = Run(AGENT_WAITS, mode="slow")
    run.until("assembling")
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == EXIT_SIGNAL_BASE + signal.SIGTERM


def test_an_agent_killed_by_others_is_told_and_its_strays_are_killed() -> None:
    run = Run(AGENT_WITH_STRAY, WAITS)
    stray = int(run.until("stray ").split()[1])
    assert run.end() == EXIT_FAILED
    assert gone(stray)
    assert any("the agent of this node was killed by SIGKILL" in line for line in run.lines)


def test_a_controller_that_dies_is_started_again() -> None:
    controller = "import os, time; os.write(1, b'controller %d\\n' % os.getpid()); time.sleep(600)"
    run = Run(AGENT_WAITS, controller)
    first = int(run.until("controller ").split()[1])
    os.kill(first, signal.SIGKILL)
    second = int(run.until("controller ").split()[1])
    assert second != first
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == EXIT_SIGNAL_BASE + signal.SIGTERM
    assert gone(second)


def test_the_only_controller_dying_again_and_again_ends_the_job() -> None:
    run = Run(AGENT_WAITS, "import os; os.write(1, b'controller\\n'); raise SystemExit(1)")
    assert run.end() == EXIT_FAILED
    assert run.lines.count("controller") == RESTARTS_MAX + 1


def test_one_of_several_controllers_dying_does_not_end_the_job() -> None:
    run = Run(AGENT_WAITS, "raise SystemExit(1)", mode="shared")
    run.until("said the controller of this node dies again and again")
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == EXIT_SIGNAL_BASE + signal.SIGTERM


def test_a_foreign_store_ends_the_job_as_a_users_error() -> None:
    run = Run(AGENT_WAITS, f"raise SystemExit({CONTROLLER_EXIT_FOREIGN_STORE})")
    assert run.end() == EXIT_USAGE


def test_children_die_with_a_launcher_killed_by_sigkill() -> None:
    run = Run(AGENT_WAITS)
    pid = int(run.until("agent ").split()[1])
    run.process.kill()
    run.process.wait(BOUND_S)
    os.close(run._reader)
    assert gone(pid)


def test_verdicts() -> None:
    assert verdict_of(Exit(code=0, signal=None), signal.SIGTERM) == 0
    assert verdict_of(Exit(code=143, signal=None), signal.SIGTERM) == EXIT_SIGNAL_BASE + signal.SIGTERM
    assert verdict_of(Exit(code=None, signal=9), None) == EXIT_FAILED
    assert verdict_of(Exit(code=5, signal=None), None) == 5


@pytest.fixture
def root() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    yield path
    shutil.rmtree(path)


def elastic_run(root: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"ELASTIC_RUN_DIR": str(root)}
    command = [sys.executable, "-m", "elastic_run.runtime.cli", *argv]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=BOUND_S, check=False)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["nothere.py"], "elastic-run: there is no script nothere.py; correct its path\n"),
        (["--nnodes=2:1", "x.py"], "elastic-run: --nnodes=2:1: MIN must be at least 1 and not above MAX\n"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(argv: list[str], line: str, root: Path) -> None:
    result = elastic_run(root, *argv)
    assert (result.returncode, result.stderr, result.stdout) == (EXIT_USAGE, line, "")
    assert list(root.iterdir()) == []


def test_the_launcher_loads_no_heavy_module() -> None:
    code = (
        "import sys, elastic_run.runtime.cli\n"
        "heavy = ('torch', 'grpc', 'google.protobuf', 'psutil', 'numpy', 'prometheus_client')\n"
        "sys.exit(' '.join(name for name in heavy if name in sys.modules) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
