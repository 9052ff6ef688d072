"""An operation under way: a generator that the engine resumes whenever what it waits for is there.

Invariants: 1. an operation ends exactly once, with its result or with an error; 2. interrupted, its algorithm is told
by an exception at its `yield`, restores its input, and only then the waiters are
(tests/integration/test_collectives_faults.py).
Not here: the algorithms (algorithms/); who may start one (group.py).
"""

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING

from elastic_run.collectives.errors import CollectiveAborted, CollectiveError, CollectiveTimeout
from elastic_run.collectives.pending import Countdown, Pending

if TYPE_CHECKING:
    from elastic_run.collectives.channel import Channel
    from elastic_run.collectives.connections import Connections
    from elastic_run.collectives.engine import Engine

log = logging.getLogger(__name__)

Algorithm = Generator[Sequence[Pending], None, None]


class Operation:
    """What every method of a group returns."""

    def __init__(
        self, name: str, engine: "Engine", channel: "Channel", algorithm: Algorithm, timeout_s: float | None
    ) -> None:
        self.name = name
        self.error: BaseException | None = None
        """Why there is no result; None while it runs and after success."""
        self.source: int | None = None
        """Rank that a receive from any source was answered by."""
        self.finished = False
        self.begun = False
        self._engine = engine
        self._channel = channel
        self._algorithm = algorithm
        self._timeout_s = timeout_s
        self._countdown: Countdown | None = None
        self._timer: int | None = None
        self._event: threading.Event | None = None
        self._callbacks: list[Callable[[Operation], None]] = []
        self._lock = threading.Lock()
        self.on_end: Callable[[Operation], None] | None = None

    # For any thread --------------------------------------------------------------------------------------------------

    @property
    def event(self) -> threading.Event:
        with self._lock:  # one event for all who wait
            if self._event is None:
                self._event = threading.Event()
                if self.finished:
                    self._event.set()
            return self._event

    def done(self) -> bool:
        """Say whether the result, or the error, is there."""
        return self.finished

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when the result is there. Raises CollectiveError, and CollectiveTimeout after `timeout_s`.

        A wait that times out ends the operation for every member: half an operation is of no use.
        """
        if not self.finished and not self._engine.wait(self, timeout_s):
            self._engine.call(lambda: self._too_late(timeout_s))
        if self.error is not None:
            # A copy: what is raised refers to the caller's frames, and so to this operation and its tensors.
            raise self.error.copy() if isinstance(self.error, CollectiveError) else self.error

    def add_done_callback(self, callback: Callable[["Operation"], None]) -> None:
        """Have `callback` called once, soon after the end, in the engine's thread; here and now when it is over."""
        with self._lock:
            if not self.finished:
                self._callbacks.append(callback)
                return
        callback(self)

    # For the engine --------------------------------------------------------------------------------------------------

    def runs_on(self, channel: "Channel") -> bool:
        return self._channel is channel

    def needs(self, peer: "Connections") -> bool:
        return self._channel.needs(peer)

    def start(self) -> None:
        if self.finished:
            return
        if self._timeout_s is not None:
            self._timer = self._engine.after(self._timeout_s, lambda: self._too_late(self._timeout_s))
        self._channel.begin()
        self._step()

    def interrupt(self, error: CollectiveError) -> None:
        """End it with `error`; its algorithm restores the input first."""
        if self.finished:
            return
        # What the peers still send must not land in buffers that are given back to their owner below.
        self._channel.cancel()
        with contextlib.suppress(CollectiveError, StopIteration):
            try:
                self._algorithm.throw(error)
                log.error("%s went on after it was interrupted", self.name)
            except Exception as broken:
                if broken is not error:
                    log.exception("%s failed while it was interrupted", self.name)
        error.__traceback__ = None  # its frames hold the operation's tensors, and the group holds the error
        self._end(error)

    def _step(self) -> None:
        if self.finished:
            return
        try:
            while True:
                countdown = Countdown(next(self._algorithm), self._resume)
                if countdown.left:
                    self._countdown = countdown
                    self._channel.waiting(countdown)
                    return
        except StopIteration:
            self._end(None)
        except CollectiveError as error:
            self._fail(error, error)
        except Exception as error:  # noqa: BLE001 - told to the waiter
            self._fail(error, CollectiveAborted(f"{self.name} failed here: {error}", self._channel.me))

    def _fail(self, error: Exception, told: CollectiveError) -> None:
        """End with what happened at this member; the group ends with what all are told."""
        self._channel.cancel()
        self._end(error)
        self._channel.give_up(told)

    def _resume(self) -> None:
        # Not from within the arrival of bytes: the connection's own state comes first.
        self._engine.soon(self._step)

    def _too_late(self, limit_s: float | None) -> None:
        self._timer = None
        if self.finished:
            return
        culprit = self._countdown.slowest() if self._countdown is not None else None
        culprit = culprit or self._channel.awaited  # between two slices nothing is waited for
        error = CollectiveTimeout(f"{self.name} did not end within {limit_s:g} s", culprit)
        self._channel.give_up(error)
        self.interrupt(error)

    def _end(self, error: BaseException | None) -> None:
        if self.finished:
            return
        if self._timer is not None:
            self._engine.cancel(self._timer)
            self._timer = None
        if self._countdown is not None:
            self._countdown.drop()
            self._countdown = None
        self._algorithm.close()
        self._channel.let_go(error)
        self.error = error
        with self._lock:
            self.finished = True
            callbacks, self._callbacks = self._callbacks, []
        if self.on_end is not None:
            self.on_end(self)
        if self._event is not None:
            self._event.set()
        for callback in callbacks:
            # Not from here: a callback may install a view while this end is a part of a larger change.
            self._engine.soon(functools.partial(self._call_back, callback))

    def _call_back(self, callback: Callable[["Operation"], None]) -> None:
        try:
            callback(self)
        except Exception:
            log.exception("a callback of %s failed", self.name)
