"""The progress engine: one epoll over every connection, driven by one thread at a time.

Who drives: a thread that waits for a result drives the engine itself, so a synchronous operation costs no thread
switch; a background thread drives while nobody waits, and stands aside for PARK_S after somebody did. Idle, it sleeps
in epoll without a time limit: idle connections cost no CPU.
Invariants: 1. one driver at a time: everything reached from a turn needs no lock (tests/integration/test_engine.py);
2. an exception that a signal handler throws into a turn closes the mesh instead of leaving it half-changed;
3. after `close`, whatever is asked is still run, by whoever asks, so that nobody waits for a driver that never comes.
Not here: what the descriptors carry (outbound.py, inbound.py); what operations do (operation.py).
"""

import heapq
import itertools
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from elastic_run.runtime.protocol.errors import InvariantViolated

PARK_S = 0.005  # longer: connections are watched later after a burst; shorter: bursts pay for thread switches
EVENTS_PER_TURN = 64
CLOSE_TIMEOUT_S = 5.0
ROLE_WAIT_S = 0.005  # for the background thread to finish its turn; longer turns end the wait without the role


class Waitable(Protocol):
    """Something that another thread may wait for: an operation, a call into the engine."""

    @property
    def finished(self) -> bool: ...

    @property
    def event(self) -> threading.Event: ...


class Call:
    """A function run by the driver on behalf of another thread."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self.event = threading.Event()
        self.error: BaseException | None = None
        self.finished = False

    def run(self) -> None:
        try:
            self._function()
        except Exception as error:  # noqa: BLE001 - handed to the caller, who raises it
            self.error = error
        self.finished = True
        self.event.set()


class Gate:
    """Something to wait for that the engine opens."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.finished = False

    def open(self) -> None:
        self.finished = True
        self.event.set()


class Engine:
    """Turns of one epoll. `on_broken` is told when a turn was torn apart by a foreign exception."""

    def __init__(self, on_broken: Callable[[BaseException], None]) -> None:
        self._epoll = select.epoll()
        try:
            self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except OSError:
            self._epoll.close()
            raise
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._role = threading.Lock()
        self._driver = 0  # thread id of the driver
        self._wanted = 0  # threads that want the role from the background thread
        self._lock = threading.Lock()  # of `_wanted` and of the wake descriptor's life
        self._freed = False
        self._unpark = threading.Event()
        self._foreign_s = 0.0  # when somebody else than the background thread last drove
        self._foreign = False
        self._polled_s = 0.0
        self._calls: deque[Callable[[], None]] = deque()
        self._ready: deque[Callable[[], None]] = deque()
        self._lazy: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_ids = itertools.count()
        self._cancelled: set[int] = set()
        self._on_broken = on_broken
        self._closed = False
        self.busy = 0
        """Operations under way: while there are any, a driver that leaves calls the background thread."""
        self._thread = threading.Thread(target=self._background, name="elastic-collectives", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            self._epoll.close()
            os.close(self._wake_fd)
            raise

    # For the driver, inside a turn -----------------------------------------------------------------------------------

    def register(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        self._handlers[fd] = handler
        self._epoll.register(fd, events)

    def modify(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def soon(self, function: Callable[[], None]) -> None:
        """Run `function` later in this turn or in the next."""
        self._ready.append(function)

    def lazily(self, function: Callable[[], None]) -> None:
        """Run `function` in the next turn, whenever that is: nobody is woken for it, PARK_S later it is done."""
        self._lazy.append(function)

    def after(self, delay_s: float, function: Callable[[], None]) -> int:
        """Run `function` once after `delay_s`; return what `cancel` takes."""
        timer = next(self._timer_ids)
        heapq.heappush(self._timers, (time.monotonic() + delay_s, timer, function))
        return timer

    def cancel(self, timer: int) -> None:
        self._cancelled.add(timer)
        if len(self._cancelled) > 64 + len(self._timers) // 2:
            self._timers = [entry for entry in self._timers if entry[1] not in self._cancelled]
            heapq.heapify(self._timers)
            self._cancelled.clear()

    @property
    def fd(self) -> int:
        """Readable while a connection, or another thread, waits for a turn."""
        return self._epoll.fileno()

    # For any thread --------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def driven_here(self) -> bool:
        """Whether this thread is in a turn: in a callback."""
        return self._driver == threading.get_ident()

    def post(self, function: Callable[[], None]) -> None:
        """Have the driver run `function`; do not wait."""
        self.enqueue(function)
        self.nudge(wake=True)

    def enqueue(self, function: Callable[[], None]) -> None:
        """Like `post`, but nobody is told until `nudge`: the caller may hold a lock."""
        self._calls.append(function)

    def nudge(self, *, wake: bool) -> None:
        """Have the driver see what was enqueued; without `wake` only if nobody drives any more.

        Without: because the caller is about to wait, and so to drive.
        """
        if self._closed:
            self._settle()
        elif wake and self._driver != threading.get_ident():
            self._unpark.set()
            self._wake()

    def call(self, function: Callable[[], None]) -> None:
        """Have `function` run by the driver, and wait; what it raises is raised here."""
        if self._driver == threading.get_ident():
            function()
            return
        call = Call(function)
        self._calls.append(call.run)
        self.wait(call, None)
        if call.error is not None:
            raise call.error

    def wait(self, thing: Waitable, timeout_s: float | None) -> bool:
        """Drive, or wait for the driver, until `thing` is finished; False when `timeout_s` passed first."""
        if self._driver == threading.get_ident():
            raise InvariantViolated("waiting inside a callback of the engine would wait for itself")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not thing.finished:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            if self._closed:
                self._settle()
                return thing.finished
            if self._take_role():
                self._drive(thing, deadline)
            else:
                self._wake()
                thing.event.wait(left if left is not None and left < 1.0 else 1.0)
        return True

    def close(self, last: Callable[[], None]) -> None:
        """Run `last` as the last call, end the background thread, free the descriptors."""
        if self._closed:
            return
        self.call(last)
        self._closed = True
        self._unpark.set()
        self._wake()
        if self._driver == threading.get_ident():
            return  # within its turn: the driver frees the descriptors when it leaves
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_TIMEOUT_S)
        with self._role:
            self._free()

    def abandon(self) -> None:
        """In a forked child: the thread is not here, epoll belongs to the parent, locks may be held by nobody."""
        self._closed = True
        self._role = threading.Lock()
        self._lock = threading.Lock()
        self._driver = 0
        self._foreign = False
        for queue in (self._calls, self._ready, self._lazy):
            queue.clear()
        self._handlers.clear()
        self._free()

    # Driving ---------------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        with self._lock:  # the number of a freed descriptor may be another file's already
            if not self._freed:
                os.eventfd_write(self._wake_fd, 1)

    def _free(self) -> None:
        """Close the descriptors. With the role."""
        with self._lock:
            if self._freed:
                return
            self._freed = True
        self._epoll.close()
        os.close(self._wake_fd)

    def _settle(self) -> None:
        """Run what was asked of a closed engine: it ends at once, with an error."""
        if self._driver == threading.get_ident():
            return  # further out on this thread's stack somebody does
        with self._role:
            self._driver = threading.get_ident()
            try:
                while self._calls or self._ready:
                    self._run_queued()
            finally:
                self._driver = 0

    def _take_role(self) -> bool:
        if self._role.acquire(blocking=False):
            return True
        if self._foreign:
            return False  # another waiting thread drives; it drives for all
        with self._lock:
            self._wanted += 1
        try:
            self._wake()
            # Not without a limit: another waiting thread may be faster, and wait for what only this thread will start.
            return self._role.acquire(timeout=ROLE_WAIT_S)
        finally:
            with self._lock:
                self._wanted -= 1

    def _drive(self, thing: Waitable, deadline: float | None) -> None:
        self._foreign = True
        self._driver = threading.get_ident()
        try:
            while not (thing.finished or self._closed) and (deadline is None or time.monotonic() < deadline):
                self._turn(deadline, thing)
            self._run_queued()  # the callbacks of what has just finished
        except BaseException as error:
            self._on_broken(error)
            raise
        finally:
            if self._closed:
                self._free()
            self._driver = 0
            self._foreign_s = time.monotonic()
            self._foreign = False
            self._role.release()
            if self.busy or self._calls or self._ready:
                self._unpark.set()

    def _background(self) -> None:
        while not self._closed:
            with self._role:
                self._driver = threading.get_ident()
                try:
                    while not self._closed and not self._wanted:
                        self._turn(None)
                except BaseException as error:  # noqa: BLE001 - a broken engine ends every operation with this reason
                    self._on_broken(error)
                finally:
                    self._driver = 0
                if self.closed:
                    self._free()
            self._park()

    def _park(self) -> None:
        self._unpark.clear()
        while not self._closed and not self._unpark.is_set():
            if not self._foreign and not self._wanted and time.monotonic() - self._foreign_s > PARK_S:
                break
            self._unpark.wait(PARK_S)

    def _turn(self, deadline: float | None, thing: Waitable | None = None) -> None:
        self._run_queued()
        while self._lazy:  # after the calls: what they sent took these along
            self._lazy.popleft()()
        finished = thing is not None and thing.finished
        now = time.monotonic()
        if self._closed or (finished and now - self._polled_s < PARK_S):
            return  # a call may have closed the engine
        # Polled also when there is nothing to wait for: whoever calls often keeps the background thread aside.
        self._polled_s = now
        for fd, events in self._epoll.poll(0.0 if finished else self._poll_timeout_s(deadline), EVENTS_PER_TURN):
            if fd == self._wake_fd:
                os.eventfd_read(fd)  # only drivers read it, and epoll has just said that there is something
                continue
            handler = self._handlers.get(fd)
            if handler is not None:  # an earlier event of this turn may have closed it
                handler(events)
        self._run_timers()
        self._run_queued()

    def _poll_timeout_s(self, deadline: float | None) -> float:
        if self._ready or self._calls or self._lazy:
            return 0.0
        until = deadline
        if self._timers and (until is None or self._timers[0][0] < until):
            until = self._timers[0][0]
        # Rounded up: epoll counts milliseconds, and a timer that is a little late beats a spin until it is due.
        return -1.0 if until is None else max(0.0, until - time.monotonic()) + 0.001

    def _run_queued(self) -> None:
        for queue in (self._calls, self._ready):
            for _ in range(len(queue)):
                queue.popleft()()

    def _run_timers(self) -> None:
        now = time.monotonic() if self._timers else 0.0
        while self._timers and self._timers[0][0] <= now:
            _, timer, function = heapq.heappop(self._timers)
            if timer in self._cancelled:
                self._cancelled.discard(timer)
            else:
                function()
