"""What compiled kernels do by themselves: an operation's bulk, between the turns of the engine.

A flow gets on in slices; between them the engine looks at its connections, so that a lost peer or a pushed view
interrupts it as it does every operation.
Not here: the flows (streamed.py: shared memory; piped.py: connections); who may begin one (channel.py).
"""

import struct
from abc import ABC, abstractmethod
from functools import lru_cache

from elastic_run.collectives.channel import Channel
from elastic_run.collectives.exact import Step
from elastic_run.collectives.operation import Algorithm
from elastic_run.collectives.recording import Moved

SLICE_NS, ALONE_NS = 1_000_000, 20_000_000
"""How long a flow goes on before the engine has a turn, if nothing happens on a connection: while other groups have
flows, and while none has. Lower: more turns per operation; higher: other flows, or timers, wait longer."""
DONE, PAUSED = range(2)  # as in stream.c and pipes.c


class Flow(ABC):
    """One operation's. Engine thread only."""

    def __init__(self, io: Channel) -> None:
        self.io = io
        self.awaited = io.others[0]
        """The member it waited for last."""

    @abstractmethod
    def advance(self, fd: int, limit_ns: int) -> int:
        """Get on until DONE, until `fd` is readable, or for so long. Raises CollectiveAborted."""

    @abstractmethod
    def unfinished(self, rank: int) -> bool:
        """Say whether something that only that member can do is still to come."""

    @abstractmethod
    def moved(self, rank: int) -> Moved:
        """Return what went to and came from a member so far."""

    @abstractmethod
    def restore(self) -> None:
        """Put back what was overwritten."""


def run(io: Channel, flow: Flow) -> Algorithm:
    """Let it get on to its end, and tell the telemetry how far it is."""
    told = dict.fromkeys(io.others, Moved()) if io.recorded else {}
    while True:
        state = flow.advance(*io.watched(SLICE_NS, ALONE_NS))
        for rank, before in told.items():
            now = flow.moved(rank)
            io.note_flow(rank, now.since(before))
            told[rank] = now
        if state == DONE:
            return
        yield [io.next_turn(flow.awaited)]


@lru_cache(maxsize=64)
def in_turn(size: int) -> bytes:
    """Return the steps that add the parts in the order of their ranks."""
    return packed((Step(0, 0, 1), *(Step(0, ~0, part) for part in range(2, size))))


@lru_cache(maxsize=64)
def packed(steps: tuple[Step, ...], ranks: tuple[int, ...] = ()) -> bytes:
    """Return steps as the kernels read them; `ranks`: whose part each is, where it is not the rank's of its number."""
    halves = (tuple(ranks[half] if ranks and half >= 0 else half for half in (step.left, step.right)) for step in steps)
    return b"".join(struct.pack("=3i", step.out, *pair) for step, pair in zip(steps, halves, strict=True))
