"""Draws a live status into the bottom row of the terminal while the scripts' output scrolls above it, undisturbed.

The terminal's scroll region keeps the row out of scrolling, so scripts write to the terminal themselves, unfiltered.
Each update is one write() that saves and restores cursor and colours.

Invariants (tests/integration/test_status_line.py):
1. On every way out, suspension by Ctrl-Z included, the whole screen scrolls again and the row is blank.
2. Updates never scroll, and change nothing but the bottom row; a row is never longer than the terminal is wide.
3. What cannot be fetched in time shows as stale; it neither ends nor delays the job.
Not here: where the numbers come from (passed in as `fetch`).
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass

from elastic_run.runtime.protocol.errors import ElasticError

INTERVAL_S = 0.5
FETCH_TIMEOUT_S = 2.0
ROWS_MIN = 5
COLUMNS_MIN = 20
SAVE, RESTORE = "\x1b7", "\x1b8"
SEPARATOR = "  "


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusSnapshot:
    """What the live status shows. None: not known yet."""

    nodes: int
    nodes_max: int
    workers: int
    view: int
    step: int | None
    step_rate_hz: float | None
    last_event: str


Fetch = Callable[[], Awaitable[StatusSnapshot]]


def terminal_fits(descriptor: int, environ: Mapping[str, str]) -> bool:
    """Whether a status can be drawn there: a terminal that understands more than text, and is large enough."""
    if not os.isatty(descriptor) or environ.get("TERM", "dumb") == "dumb":
        return False
    size = os.get_terminal_size(descriptor)
    return size.lines >= ROWS_MIN and size.columns >= COLUMNS_MIN


def render(snapshot: StatusSnapshot | None, *, stale: bool, columns: int) -> str:
    """Return the row's text: printable ASCII, at most `columns` long."""
    if snapshot is None:
        parts = ["starting"]
    else:
        parts = [
            f"nodes {snapshot.nodes}/{snapshot.nodes_max}",
            f"workers {snapshot.workers}",
            f"view {snapshot.view}",
        ]
        if snapshot.step is not None:
            parts.append(f"step {snapshot.step}")
        if snapshot.step_rate_hz is not None:
            parts.append(f"{snapshot.step_rate_hz:.3g} steps/s")
        if stale:
            parts.append("controller away")
        if snapshot.last_event:
            parts.append(f"| {snapshot.last_event}")
    text = SEPARATOR.join(["elastic-run", *parts])
    return "".join(letter if " " <= letter <= "~" else "?" for letter in text)[:columns]


@contextlib.asynccontextmanager
async def status_line(fetch: Fetch, *, descriptor: int = 2) -> AsyncIterator[None]:
    """Draw the status while the context is open."""
    row = _BottomRow(descriptor)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGWINCH, row.adapt)
    loop.add_signal_handler(signal.SIGTSTP, row.suspend)
    drawing = asyncio.create_task(_draw_on(row, fetch))
    try:
        row.open()
        yield
    finally:
        drawing.cancel()
        await asyncio.wait([drawing])
        loop.remove_signal_handler(signal.SIGTSTP)
        loop.remove_signal_handler(signal.SIGWINCH)
        row.close()


async def _draw_on(row: "_BottomRow", fetch: Fetch) -> None:
    snapshot: StatusSnapshot | None = None
    while True:
        stale = False
        try:
            snapshot = await asyncio.wait_for(fetch(), FETCH_TIMEOUT_S)
        except (ElasticError, TimeoutError):
            stale = True
        row.show(snapshot, stale=stale)
        await asyncio.sleep(INTERVAL_S)


class _BottomRow:
    """The last row of a terminal, kept out of scrolling while open."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._open = False
        self._rows = 0
        self._columns = 0
        self._shown: tuple[StatusSnapshot | None, bool] = (None, False)

    def open(self) -> None:
        """Reserve the row. The line feed makes room if the cursor is in it; the cursor then goes back up."""
        size = self._size()
        self._rows, self._columns = size.lines, size.columns
        if self._rows < ROWS_MIN or self._columns < COLUMNS_MIN:
            return
        self._open = True
        self._write(f"\n{SAVE}\x1b[1;{self._rows - 1}r{RESTORE}\x1b[1A{self._drawn()}")

    def close(self) -> None:
        """Give the row back, blank, and leave the cursor where it was."""
        if self._open:
            self._open = False
            still_there = self._size().lines >= self._rows  # else the terminal shrank, and cut it off
            blank = f"\x1b[{self._rows};1H\x1b[2K" if still_there else ""
            self._write(f"{SAVE}\x1b[r{blank}{RESTORE}")

    def show(self, snapshot: StatusSnapshot | None, *, stale: bool) -> None:
        """Draw, if there is anything new."""
        if self._shown != (snapshot, stale):
            self._shown = (snapshot, stale)
            if self._open:
                self._write(self._drawn())

    def adapt(self) -> None:
        """Follow a change of the terminal's size."""
        size = self._size()
        if (size.lines, size.columns) != (self._rows, self._columns):
            self.close()
            self.open()

    def suspend(self) -> None:
        """Ctrl-Z: give the terminal back, stop this process, and take the row again when it is continued."""
        self.close()
        os.kill(os.getpid(), signal.SIGSTOP)
        self.open()

    def _drawn(self) -> str:
        snapshot, stale = self._shown
        text = render(snapshot, stale=stale, columns=self._columns - 1)  # the last cell would wrap on some terminals
        return f"{SAVE}\x1b[{self._rows};1H\x1b[0;7m{text}\x1b[0m\x1b[K{RESTORE}"

    def _size(self) -> os.terminal_size:
        try:
            return os.get_terminal_size(self._descriptor)
        except OSError:  # the terminal is gone
            return os.terminal_size((0, 0))

    def _write(self, sequence: str) -> None:
        with contextlib.suppress(OSError):  # the terminal is gone, or full: the next update shows the same
            sys.stderr.flush()
            os.write(self._descriptor, sequence.encode())
