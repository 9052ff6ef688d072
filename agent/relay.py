"""Moves the output of --tee: from a worker's pipe as it is into its file, and line by line, prefixed, to the console.

Each pipe has one reader task, woken by the event loop, and one chunk in flight; all writing is done by one thread,
since a console or disk may block and the agent must not. So lines of several workers never mix, a slow console slows
the workers as an inherited one would, and memory stays bounded.

Invariants (tests/integration/test_output_relay.py):
1. Every byte reaches the file, in order, and every line the console.
2. A file or console that fails is reported once and does not stop the other.
3. finish() ends: a process that keeps a pipe open without writing costs DRAIN_IDLE_S.
Not here: which stream goes where (output.py); what a line is (lines.py).
"""

import asyncio
import fcntl
import os
import queue
import select
import threading
from collections.abc import Callable, Sequence
from typing import Any

from elastic_run.agent.lines import LineCutter, prefixed

CHUNK_BYTES = 64 << 10
"""Read at once per stream. Higher only costs memory: a wake-up per 64 KiB is far below 1 % of a core."""
PIPE_BYTES = 256 << 10
"""Asked-for capacity of a pipe: lets a worker run on while the console is slow for a moment."""
SLICE_BYTES = 16 << 10
"""Written at once, so that a console that is slow can be told from one that is stuck."""
DRAIN_IDLE_S = 2.0
"""Without a byte moving for this long, what is left in a pipe is given up. Only asked after all workers are gone."""
DRAIN_MAX_S = 60.0
CONSOLE_WAIT_MS = 1000
"""How long one wait for a console that someone made non-blocking lasts; then it is asked again."""

Say = Callable[[str], None]


class Sink:
    """One file descriptor written by the relay's thread; a failure is said once and never raised."""

    def __init__(self, fd: int, name: str, say: Say, *, owned: bool) -> None:
        self.bytes_written = 0
        self.bytes_lost = 0
        self._fd = fd
        self._name = name
        self._say = say
        self._owned = owned
        self._dead = False

    def write(self, data: bytes) -> None:
        """Write all of `data`. A full disk is tried again with the next chunk, a console that hung up is not."""
        view = memoryview(data)
        while view and not self._dead:
            try:
                written = os.write(self._fd, view[:SLICE_BYTES])
            except BlockingIOError:
                select.select([], [self._fd], [], CONSOLE_WAIT_MS / 1000)
                continue
            except OSError as error:
                self._failed(error)
                break
            view = view[written:]
            self.bytes_written += written
        self.bytes_lost += len(view)

    def close(self) -> None:
        if self._owned:
            os.close(self._fd)
        if self.bytes_lost:
            self._say(f"{self.bytes_lost} bytes of output could not be written to {self._name}")

    def _failed(self, error: OSError) -> None:
        if self.bytes_lost == 0:
            self._say(f"output cannot be written to {self._name}: {error.strerror}; the job goes on without it")
        self._dead = not self._owned


class FilteredFile:
    """Collects the lines that hold one of some needles, of all ranks."""

    def __init__(self, sink: Sink, needles: Sequence[str]) -> None:
        self.sink = sink
        self._needles = tuple(needle.encode(errors="surrogateescape") for needle in needles)

    def write(self, prefix: bytes, lines: list[bytes]) -> None:
        matching = [line for line in lines if any(needle in line for needle in self._needles)]
        self.sink.write(prefixed(prefix, matching))


class Tee:
    """What is done with one stream; runs in the relay's thread."""

    def __init__(self, prefix: bytes, file: Sink, console: Sink, filtered: FilteredFile | None) -> None:
        self._prefix = prefix
        self._file = file
        self._console = console
        self._filtered = filtered
        self._cutter = LineCutter()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._show(self._cutter.feed(data))

    def end(self) -> None:
        self._show(self._cutter.end())
        self._file.close()

    @property
    def bytes_moved(self) -> int:
        """Grows while anything is getting through."""
        return self._file.bytes_written + self._console.bytes_written + self._console.bytes_lost

    def _show(self, lines: list[bytes]) -> None:
        self._console.write(prefixed(self._prefix, lines))
        if self._filtered is not None:
            self._filtered.write(self._prefix, lines)


class OutputRelay:
    """All teed streams of one attempt. Used from the event loop's thread; `say` is called in it."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._loop = asyncio.get_running_loop()
        self._thread = _WriterThread(self._loop)
        self._streams: dict[asyncio.Task[None], Tee] = {}
        self._consoles: dict[int, Sink] = {}
        self._filtered: list[FilteredFile] = []

    def console(self, fd: int) -> Sink:
        """Return the sink of the agent's own stdout (1) or stderr (2), shared by all streams that end there."""
        if fd not in self._consoles:
            self._consoles[fd] = self._sink(fd, "the console", owned=False)
        return self._consoles[fd]

    def filtered_file(self, path: str, needles: Sequence[str]) -> FilteredFile:
        """Open a file for matching lines of all ranks. Raises OSError."""
        self._filtered.append(FilteredFile(self._sink(open_private(path), path, owned=True), needles))
        return self._filtered[-1]

    def open(self, *, path: str, console: Sink, prefix: bytes, filtered: FilteredFile | None) -> int:
        """Start to relay one stream; return the pipe's end to give to the worker and then to close. Raises OSError."""
        file_fd = open_private(path)
        try:
            read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        except OSError:
            os.close(file_fd)
            raise
        os.set_blocking(read_fd, False)
        _enlarge(write_fd)
        tee = Tee(prefix, self._sink(file_fd, path, owned=True), console, filtered)
        self._streams[self._loop.create_task(self._pump(read_fd, tee))] = tee
        return write_fd

    async def finish(self) -> None:
        """Wait until everything written so far has passed, then close the files; every worker must be gone.

        A stream on which nothing moves for DRAIN_IDLE_S, or that has not ended after DRAIN_MAX_S, is given up.
        """
        deadline_s = self._loop.time() + DRAIN_MAX_S
        moved = -1
        while self._streams and self._loop.time() < deadline_s and moved != (moved := self._bytes_moved()):
            await asyncio.wait(list(self._streams), timeout=DRAIN_IDLE_S)
            for task in [task for task in self._streams if task.done()]:
                del self._streams[task]
        given_up = list(self._streams)
        self._streams.clear()
        for task in given_up:
            task.cancel()
        if given_up:
            await asyncio.wait(given_up)
            self._say(f"{len(given_up)} output streams did not end; the rest of them is lost")
        for filtered in self._filtered:
            self._thread.submit(filtered.sink.close)
        self._filtered.clear()
        for console in self._consoles.values():
            self._thread.submit(console.close)
        self._consoles.clear()
        await asyncio.wait([self._thread.stop()], timeout=DRAIN_IDLE_S)

    def _bytes_moved(self) -> int:
        return sum(tee.bytes_moved for tee in self._streams.values())

    def _sink(self, fd: int, name: str, *, owned: bool) -> Sink:
        return Sink(fd, name, lambda text: self._thread.post(self._say, text), owned=owned)

    async def _pump(self, read_fd: int, tee: Tee) -> None:
        try:
            while data := await _read(self._loop, read_fd):
                await self._thread.submit(tee.write, data)
        finally:
            os.close(read_fd)
            ended = self._thread.submit(tee.end)
        await ended


class _WriterThread:
    """Runs jobs in order. A daemon: a console stopped by its user must not keep the agent from ending."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        # Unbounded in type, bounded in use: one job for each stream, and a few at the end.
        self._jobs: queue.SimpleQueue[tuple[asyncio.Future[None], Callable[..., None] | None, tuple[Any, ...]]]
        self._jobs = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[..., None], *args: Any) -> asyncio.Future[None]:
        """Queue a job; the future ends with it. Jobs do not raise."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="elastic-run-output", daemon=True)
            self._thread.start()
        return self._put(job, *args)

    def stop(self) -> asyncio.Future[None]:
        """End the thread after the jobs queued so far; the future ends with it."""
        if self._thread is None:
            future = self._loop.create_future()
            future.set_result(None)
            return future
        self._thread = None
        return self._put(None)

    def post(self, callback: Callable[..., None], *args: Any) -> None:
        """Call `callback` in the event loop; from any thread."""
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the loop is closed: nobody is left to be told
            return

    def _put(self, job: Callable[..., None] | None, *args: Any) -> asyncio.Future[None]:
        future: asyncio.Future[None] = self._loop.create_future()
        self._jobs.put((future, job, args))
        return future

    def _run(self) -> None:
        while True:
            future, job, args = self._jobs.get()
            if job is not None:
                job(*args)
            self.post(_finish_future, future)
            if job is None:
                return


def open_private(path: str) -> int:
    """Return a descriptor of a new or emptied file of mode 0600. Raises OSError."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _finish_future(future: asyncio.Future[None]) -> None:
    if not future.done():  # its waiter may have been cancelled
        future.set_result(None)


async def _read(loop: asyncio.AbstractEventLoop, fd: int) -> bytes:
    """Return the next bytes of a non-blocking pipe, empty at its end."""
    while True:
        try:
            return os.read(fd, CHUNK_BYTES)
        except BlockingIOError:
            readable = loop.create_future()
            loop.add_reader(fd, _finish_future, readable)
            try:
                await readable
            finally:
                loop.remove_reader(fd)


def _enlarge(pipe_fd: int) -> None:
    try:
        fcntl.fcntl(pipe_fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    except OSError:  # the user's allowance of pipe memory is used up: the default size does
        return
