"""The live status on a real pseudo-terminal, read back through a small screen."""

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import textwrap
from collections.abc import Callable, Iterator

import pytest
from screen import Screen

from elastic_run.runtime.status_line import StatusSnapshot, render, terminal_fits

BOUND_S = 30.0
SNAPSHOT = StatusSnapshot(
    nodes=2, nodes_max=4, workers=8, view=3, step=120, step_rate_hz=4.5, last_event="node b joined"
)
SHOWN = "elastic-run  nodes 2/4  workers 8  view 3  step 120  4.5 steps/s  | node b joined"
# Commands come on stdin: a line to print, `stale`, `next` (another view), `raise`, `end`.
PROGRAM = """
    import asyncio, os, sys
    from dataclasses import replace
    from elastic_run.runtime import status_line as module
    from elastic_run.runtime.protocol.errors import StoreUnavailable
    module.INTERVAL_S = 0.01
    snapshot = module.StatusSnapshot(
        nodes=2, nodes_max=4, workers=8, view=3, step=120, step_rate_hz=4.5, last_event="node b joined"
    )
    stale = False

    async def fetch():
        if stale:
            raise StoreUnavailable("away")
        return snapshot

    async def main():
        global stale, snapshot
        loop = asyncio.get_running_loop()
        commands = asyncio.Queue()
        loop.add_reader(0, lambda: [commands.put_nowait(c) for c in os.read(0, 10000).decode().splitlines()])
        async with module.status_line(fetch):
            while True:
                match await commands.get():
                    case "end":
                        return
                    case "raise":
                        raise RuntimeError("broken on purpose")
                    case "stale":
                        stale = True
                    case "next":
                        snapshot = replace(snapshot, view=snapshot.view + 1)
                    case text:
                        os.write(1, text.encode() + b"\\n")

    asyncio.run(main())
"""


class Session:
    """The program on a terminal of its own, commands by a pipe."""

    def __init__(self, rows: int, columns: int) -> None:
        self.screen = Screen(rows, columns)
        self.raw = ""
        self._master, self._slave = pty.openpty()
        self.resize(rows, columns, tell=False)
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=self._slave,
            stderr=self._slave,
            env=os.environ | {"TERM": "xterm"},
        )

    def resize(self, rows: int, columns: int, *, tell: bool = True) -> None:
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        if tell:
            self.screen.resize(rows, columns)
            self.process.send_signal(signal.SIGWINCH)

    def command(self, *lines: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("".join(line + "\n" for line in lines).encode())
        self.process.stdin.flush()

    def until(self, condition: Callable[[Screen], bool]) -> None:
        while not condition(self.screen):
            assert self._read(BOUND_S), f"nothing more comes; on the screen: {self.screen.shown}"

    def end(self) -> int:
        code = self.process.wait(BOUND_S)
        while self._read(0):
            pass
        return code

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self._master], [], [], timeout_s)[0]:
            return False
        text = os.read(self._master, 65536).decode()
        self.raw += text
        self.screen.feed(text)
        return True

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        os.close(self._master)
        os.close(self._slave)


@pytest.fixture
def session() -> Iterator[Session]:
    running = Session(10, 100)
    yield running
    running.close()


def status_shown(screen: Screen) -> bool:
    return screen.text(screen.rows - 1) == SHOWN


def test_status_stays_at_the_bottom_while_output_scrolls_above_it(session: Session) -> None:
    session.until(status_shown)
    session.command(*(f"line {number}" for number in range(30)))
    session.until(lambda screen: screen.text(7) == "line 29")
    assert session.screen.shown == [*(f"line {number}" for number in range(22, 30)), "", SHOWN]
    assert session.screen.scrolled_off[-1] == "line 21"


def test_an_update_changes_the_bottom_row_alone(session: Session) -> None:
    session.command("one", "two")
    session.until(lambda screen: status_shown(screen) and "two" in screen.shown)
    above = session.screen.shown[:-1]
    cursor = (session.screen.row, session.screen.column)
    session.command("next")
    session.until(lambda screen: "view 4" in screen.text(9))
    assert session.screen.shown[:-1] == above
    assert (session.screen.row, session.screen.column) == cursor


def test_what_cannot_be_fetched_shows_as_stale(session: Session) -> None:
    session.until(status_shown)
    session.command("stale")
    session.until(lambda screen: "controller away" in screen.text(9))
    assert "step 120" in session.screen.text(9)


@pytest.mark.parametrize("way_out", ["end", "raise"])
def test_on_every_way_out_the_whole_screen_scrolls_and_the_row_is_blank(session: Session, way_out: str) -> None:
    session.command("before")
    session.until(lambda screen: status_shown(screen) and "before" in screen.shown)
    session.command(way_out)
    assert session.end() == (0 if way_out == "end" else 1)
    assert session.screen.scrolls_whole
    assert not any("nodes 2/4" in line for line in session.screen.shown)
    expected = "before" if way_out == "end" else "RuntimeError: broken on purpose"
    assert expected in [*session.screen.scrolled_off, *session.screen.shown]


def test_a_resize_moves_the_status_to_the_new_bottom(session: Session) -> None:
    session.until(status_shown)
    session.resize(14, 60)
    session.until(lambda screen: screen.text(13) == SHOWN[:59])
    session.resize(8, 100)
    session.until(status_shown)
    assert (session.screen.top, session.screen.bottom) == (0, 6)


def test_a_terminal_too_small_for_it_is_left_alone_until_it_grows(session: Session) -> None:
    session.until(status_shown)
    session.resize(3, 100)
    session.command("plain")
    session.until(lambda screen: "plain" in screen.shown)
    session.resize(9, 100)
    session.until(status_shown)


def test_suspended_by_ctrl_z_the_terminal_is_free_and_taken_again_afterwards(session: Session) -> None:
    session.until(status_shown)
    session.process.send_signal(signal.SIGTSTP)
    os.waitid(os.P_PID, session.process.pid, os.WSTOPPED | os.WNOWAIT)
    session.until(lambda screen: screen.scrolls_whole)
    assert "nodes" not in session.screen.text(9)
    session.process.send_signal(signal.SIGCONT)
    session.until(status_shown)


def test_every_update_is_small_enough_for_one_write(session: Session) -> None:
    session.until(status_shown)
    assert len(session.raw.encode()) < 2048  # a terminal takes that much at once


def test_rendering_is_bounded_printable_and_honest() -> None:
    assert render(SNAPSHOT, stale=False, columns=200) == SHOWN
    assert render(SNAPSHOT, stale=False, columns=30) == SHOWN[:30]
    assert render(None, stale=True, columns=80) == "elastic-run  starting"
    odd = StatusSnapshot(nodes=1, nodes_max=1, workers=1, view=0, step=None, step_rate_hz=None, last_event="\x1b[2Jä\n")
    assert render(odd, stale=False, columns=80) == "elastic-run  nodes 1/1  workers 1  view 0  | ?[2J??"


def test_it_is_for_terminals_only() -> None:
    reader, writer = os.pipe()
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    try:
        assert not terminal_fits(writer, {"TERM": "xterm"})
        assert terminal_fits(slave, {"TERM": "xterm"})
        assert not terminal_fits(slave, {"TERM": "dumb"})
        assert not terminal_fits(slave, {})
    finally:
        for descriptor in (reader, writer, master, slave):
            os.close(descriptor)
