"""Futures of the torch facade, completed in threads of their own.

A callback that a script (or a DDP communication hook) attaches to a future may itself wait for a collective. So it
must not run in the thread that makes collectives progress.
Invariants: 1. at most THREADS threads, started on first use, gone after `close` (tests/integration/test_torch_work.py);
2. a failed future carries a C++ error: DDP's reducer reads the values of futures in C++, and an exception object set
from Python would be such a value, and crash it.
"""

import queue
import threading
from collections.abc import Callable

import torch

from elastic_run.runtime.protocol.errors import InvariantViolated

THREADS = 4
"""So many callbacks may wait for collectives at a time before others are late."""
CLOSE_TIMEOUT_S = 5.0


class FutureThreads:
    """Runs what completes futures."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # bound: operations under way
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._free = 0  # threads without a job, less the jobs that wait for one
        self._closed = False

    def submit(self, job: Callable[[], None]) -> None:
        """Have `job` run soon. After `close` it runs here and now."""
        with self._lock:
            if not self._closed:
                self._free -= 1
                if self._free < 0 and len(self._threads) < THREADS:
                    self._start_thread()
                    self._free += 1
                self._jobs.put(job)
                return
        job()

    def close(self) -> None:
        """Finish what was submitted, then end the threads."""
        with self._lock:
            self._closed = True
            threads, self._threads = self._threads, []
        for _ in threads:
            self._jobs.put(None)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(CLOSE_TIMEOUT_S)

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._work, name="elastic-futures", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            job()
            with self._lock:
                self._free += 1


class Promise:
    """A future and the way to complete it."""

    def __init__(self) -> None:
        self._start: torch._C.Future[object] = torch._C.Future([])
        self._value: object = None
        self._error: BaseException | None = None
        self.future = self._start.then(self._outcome)

    def complete(self, value: object) -> None:
        """Give it a value: tensors, or lists of them. Callbacks run before this returns."""
        self._value = value
        self._start.set_result(None)

    def fail(self, error: BaseException) -> None:
        """Give it an error: who waits gets a RuntimeError with its text."""
        self._error = error
        self._start.set_result(None)

    def _outcome(self, start: object) -> object:
        if self._error is not None:
            raise self._error
        if start is None:
            raise InvariantViolated("the first future of a chain is always there")
        return self._value
