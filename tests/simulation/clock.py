"""Virtual time: one queue of moments, one source of chance, processes that can stall and die.

Invariants:
1. Everything that happens is a callback of this queue; ties are broken by order of scheduling.
2. A dead process runs nothing; a stalled one runs what it missed when it goes on, in the order it was missed.
3. The transcript depends on the seed only (tests/simulation/test_seeds.py).
"""

import hashlib
import heapq
import random
from collections import deque
from collections.abc import Callable

MOMENTS_MAX = 2_000_000
"""A world that needs more has run away."""
TAIL_LINES = 1000
OFFSET_S_MAX = 1_000_000.0

Callback = Callable[[], None]


class RanAway(AssertionError):
    """A world that does not come to rest."""


class Simulation:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self._queue: list[tuple[float, int, Callback]] = []
        self._scheduled = 0
        self._ran = 0
        self._digest = hashlib.sha256()
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)

    def at(self, delay_s: float, callback: Callback) -> None:
        self._scheduled += 1
        heapq.heappush(self._queue, (self.now + delay_s, self._scheduled, callback))

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.rng.random()

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def run_until(self, moment: float, done: Callable[[], bool] = lambda: False) -> bool:
        """Run up to a moment, or until `done()`. Returns whether it is done."""
        while not done():
            if not self._queue or self._queue[0][0] > moment:
                self.now = max(self.now, moment)
                return done()
            self.now, _, callback = heapq.heappop(self._queue)
            self._ran += 1
            if self._ran > MOMENTS_MAX:
                raise RanAway(f"over {MOMENTS_MAX} moments at {self.now:.1f} s")
            callback()
        return True

    def tell(self, who: str, what: str) -> None:
        """Add a line to the transcript."""
        line = f"{self.now:10.4f} {who:<8} {what}"
        self._digest.update(line.encode())
        self.tail.append(line)

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()


class Process:
    """Something that runs on a host, with a monotonic clock of its own."""

    def __init__(self, sim: Simulation, name: str, host: str) -> None:
        self.sim, self.name, self.host = sim, name, host
        self.alive, self.stalled = True, False
        self._offset_s = sim.between(0.0, OFFSET_S_MAX)
        self._missed: list[Callback] = []

    def clock(self) -> float:
        return self.sim.now + self._offset_s

    def tell(self, what: str) -> None:
        self.sim.tell(self.name, what)

    def after(self, delay_s: float, callback: Callback) -> None:
        self.sim.at(delay_s, lambda: self.run(callback))

    def run(self, callback: Callback) -> None:
        """Run now; later when stalled; never when dead."""
        if not self.alive:
            return
        if self.stalled:
            self._missed.append(callback)
        else:
            callback()

    def stall(self) -> None:
        self.tell("is stopped")
        self.stalled = True

    def resume(self) -> None:
        if not self.stalled:
            return
        self.tell("goes on")
        self.stalled = False
        missed, self._missed = self._missed, []
        for callback in missed:  # each of them may kill this process, or stall it again
            self.run(callback)

    def end(self) -> None:
        self.alive = False
        self._missed = []
