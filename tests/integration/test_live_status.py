"""The live status of a real job: its source, and the line on a real (pseudo) terminal from start to end."""

import asyncio
import os
import pty
import signal
import subprocess
import termios
import threading
from collections.abc import Iterator

import pytest
from launching import BOUND_S, CONTROLLER, SCRIPTS, Bench, wait_until

from elastic_run.runtime.edge.rundir import local_jobs
from elastic_run.runtime.flags import read_command_line
from elastic_run.runtime.live_status import ASK_INTERVAL_S, live_status
from elastic_run.runtime.protocol.config import StoreConfig
from elastic_run.runtime.protocol.errors import ElasticError
from elastic_run.runtime.status_line import StatusSnapshot

WHOLE_SCREEN_SCROLLS = "\x1b[r"


@pytest.fixture
def bench() -> Iterator[Bench]:
    with Bench() as made:
        yield made


class Terminal:
    """`elastic-run` on a terminal of its own; everything it shows is kept."""

    def __init__(self, bench: Bench, *argv: object) -> None:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 120))
        self.process = subprocess.Popen(
            bench.command(*argv), env=bench.env | {"TERM": "xterm"}, stdin=slave, stdout=slave, stderr=slave
        )
        os.close(slave)
        self.shown = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def until(self, text: str) -> None:
        wait_until(lambda: text in self.shown, f"{text!r} on the terminal, which shows {self.shown[-500:]!r}")

    def end(self) -> int:
        code = self.process.wait(BOUND_S)
        self._reader.join(BOUND_S)
        os.close(self._master)
        return code

    def _read(self) -> None:
        try:
            while chunk := os.read(self._master, 65536):
                self.shown += chunk.decode(errors="replace")
        except OSError:  # how the end of a terminal reads
            return


@pytest.mark.parametrize("how", ["success", "failure", "interrupt"])
def test_the_line_shows_the_job_and_the_terminal_is_given_back(how: str, bench: Bench) -> None:
    terminal = Terminal(bench, SCRIPTS / "wait_for_go.py", bench.files)
    bench.await_files("rank-0.0", "rank-1.0")
    terminal.until("nodes 1/1  workers 2  view 1  | view 1 installed")
    assert WHOLE_SCREEN_SCROLLS not in terminal.shown
    match how:
        case "success":
            (bench.files / "go").touch()
        case "failure":
            os.kill(int((bench.files / "rank-1.0").read_text()), signal.SIGKILL)
        case "interrupt":
            terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == {"success": 0, "failure": 1, "interrupt": 130}[how]
    assert WHOLE_SCREEN_SCROLLS in terminal.shown
    assert "Traceback" not in terminal.shown.replace("Traceback (most recent call last)", "", 2)  # the two workers' own
    bench.assert_nothing_left()


def test_a_stopped_controller_is_shown_as_away_and_costs_nothing_else(bench: Bench) -> None:
    terminal = Terminal(bench, SCRIPTS / "wait_for_go.py", bench.files)
    bench.await_files("rank-0.0", "rank-1.0")
    terminal.until("workers 2")
    controller = bench.process(CONTROLLER)
    os.kill(controller, signal.SIGSTOP)
    terminal.until("controller away")
    os.kill(controller, signal.SIGKILL)
    terminal.until("leads with token")  # the next one, found by itself
    (bench.files / "go").touch()
    assert terminal.end() == 0
    bench.assert_nothing_left()


async def test_the_source_asks_once_a_second_and_finds_the_next_leader(bench: Bench) -> None:
    run = bench.run(SCRIPTS / "wait_for_go.py", bench.files)
    bench.await_files("rank-0.0", "rank-1.0")
    [job] = local_jobs(bench.root)
    flags = ["--standalone", str(SCRIPTS / "wait_for_go.py")]
    config = read_command_line(flags, {}, python="python", random_id=job.job_id)
    async with live_status(StoreConfig(endpoints=job.endpoints), config) as fetch:
        first = await fetch()
        assert (first.nodes, first.nodes_max, first.view, first.step) == (1, 1, 1, None)
        assert await fetch() is first  # within ASK_INTERVAL_S nobody is asked again
        os.kill(bench.process(CONTROLLER), signal.SIGKILL)
        seen: list[StatusSnapshot | ElasticError] = []
        async with asyncio.timeout(BOUND_S):
            while not (seen and isinstance(seen[-1], StatusSnapshot) and "leads with" in seen[-1].last_event):
                try:
                    seen.append(await fetch())
                except ElasticError as error:
                    seen.append(error)
                await asyncio.sleep(ASK_INTERVAL_S / 10)
    (bench.files / "go").touch()
    assert run.end() == 0
    bench.assert_nothing_left()
