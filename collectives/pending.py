"""Things an algorithm waits for: a message that arrives, a message that leaves.

An algorithm is a generator; it yields the pendings it needs and is resumed when all are done. Engine thread only.
"""

from collections.abc import Callable, Iterable


class Pending:
    """One thing waited for. `done` never goes back."""

    __slots__ = ("done", "first_ns", "peer", "waiter")

    def __init__(self, peer: str) -> None:
        self.peer = peer
        """Worker id of who makes it happen: the one to name when time runs out."""
        self.done = False
        self.first_ns = 0
        """When its first byte came or left, where that is before its last; monotonic."""
        self.waiter: Countdown | None = None

    def finish(self) -> None:
        if not self.done:
            self.done = True
            if self.waiter is not None:
                self.waiter.one_done(self)


class Countdown:
    """Calls `resume` once, when every one of `pendings` is done.

    Once done, neither side refers to the other: an operation's memory is free when it ends, not when the interpreter
    next looks for cycles.
    """

    __slots__ = ("left", "note", "pendings", "resume")

    def __init__(self, pendings: Iterable[Pending], resume: Callable[[], None]) -> None:
        self.pendings = [pending for pending in pendings if not pending.done]
        self.left = len(self.pendings)
        self.resume = resume
        self.note: Callable[[Pending], None] | None = None
        """Told of each that is done."""
        for pending in self.pendings:
            pending.waiter = self

    def one_done(self, pending: Pending) -> None:
        pending.waiter = None
        if self.note is not None:
            self.note(pending)
        self.left -= 1
        if not self.left:
            self.resume()

    def drop(self) -> None:
        """The operation is over, whatever is still to come."""
        for pending in self.pendings:
            pending.waiter = None

    def slowest(self) -> str | None:
        """Return the worker that is still waited for."""
        return next((pending.peer for pending in self.pendings if not pending.done), None)
