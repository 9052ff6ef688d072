"""Streams between agents and controllers over links that delay, break and fall silent.

Messages of one direction keep their order. A silent link (one way or both) holds what is sent until it heals, as TCP
does; keep-alives end a stream that stays silent. What is under way when a stream breaks is lost.
Not here: when a link fails (swarm.py), what is said (candidate.py, node.py).
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from simulation.clock import Process, Simulation

DELAY_S = (0.0002, 0.004)
SLOW_DELAY_S = (0.05, 0.8)
RETRANSMIT_S = (0.01, 0.5)
KEEPALIVE_S = (2.0, 4.0)
"""A ping every 2 s, answered within 2 s (runtime/edge/rpc.py)."""
CONNECT_DEADLINE_S = 3.0  # agent/session.py


@dataclass(frozen=True, slots=True)
class Closed:
    """Last thing said on a stream that is ended in order."""

    reason: str


class End:
    """One side of a stream."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.open = True
        self.on_message: Callable[[Any], None] = lambda _: None
        self.on_end: Callable[[str], None] = lambda _: None
        #: sent by the other side, not yet here
        self.coming: deque[Any] = deque()
        self.last_due = 0.0
        self.epoch = 0


class Stream:
    """`ends[0]` dialled, `ends[1]` answered."""

    def __init__(self, network: "Network", dialler: Process, server: Process) -> None:
        self.network, self.sim, self.number = network, network.sim, 0
        self.ends = (End(dialler), End(server))

    def send(self, side: int, message: Any) -> None:
        """Send from one side. Nothing is sent on an end that is closed."""
        if self.ends[side].open:
            target = self.ends[1 - side]
            target.coming.append(message)
            self._schedule(1 - side, self.network.delay_s())

    def close(self, side: int, reason: str) -> None:
        """End it in order: what was sent before arrives."""
        if self.ends[side].open:
            self.send(side, Closed(reason))
            self.ends[side].open = False
            self.ends[side].coming.clear()
            self._forget()

    def break_off(self, side: int, reason: str, *, silently: bool = False) -> None:
        """One side is gone at once; the other is told when a reset gets through, else by its keep-alive."""
        here, there = self.ends[side], self.ends[1 - side]
        if not here.open:
            return
        here.open = False
        here.coming.clear()
        there.coming.clear()
        if here.process.alive and not silently:
            here.process.run(lambda: here.on_end(reason))
        if there.open:
            if not silently and self.network.passes(here.process.host, there.process.host):
                self.sim.at(self.network.delay_s(), lambda: self._lost(1 - side, "the stream was reset"))
            else:
                self.sim.at(self.sim.between(*KEEPALIVE_S), lambda: self._lost(1 - side, "no keep-alive"))
        self._forget()

    def _lost(self, side: int, reason: str) -> None:
        end = self.ends[side]
        if end.open:
            end.open = False
            end.coming.clear()
            end.process.run(lambda: end.on_end(reason))
        self._forget()

    def disturbed(self) -> None:
        """A link of this stream fell silent or a process of it stalled: whoever runs will notice, unless it heals."""
        for side in (0, 1):
            end = self.ends[side]
            end.epoch += 1
            epoch = end.epoch
            self.sim.at(self.sim.between(*KEEPALIVE_S), partial(self._check, side, epoch))

    def healed(self) -> None:
        """Send again what was held; no keep-alive is missed any more when both ways are open."""
        both = self.network.both_ways(self.ends[0].process.host, self.ends[1].process.host)
        for side in (0, 1):
            self.ends[side].epoch += both
            delay_s = self.sim.between(*RETRANSMIT_S)
            for _ in self.ends[side].coming:
                self._schedule(side, delay_s)

    def _check(self, side: int, epoch: int) -> None:
        here, there = self.ends[side], self.ends[1 - side]
        if not here.open or here.epoch != epoch or here.process.stalled:
            return
        if there.process.stalled or not self.network.both_ways(here.process.host, there.process.host):
            self.break_off(side, "no answer to a keep-alive")

    def _schedule(self, side: int, delay_s: float) -> None:
        end = self.ends[side]
        end.last_due = max(end.last_due, self.sim.now + delay_s)
        self.sim.at(end.last_due - self.sim.now, lambda: self._arrive(side))

    def _arrive(self, side: int) -> None:
        here, there = self.ends[side], self.ends[1 - side]
        if not here.open or not here.coming or not self.network.passes(there.process.host, here.process.host):
            return  # a silent link: healed() sends it again
        message = here.coming.popleft()
        here.process.run(lambda: self._take(here, message))

    def _take(self, end: End, message: Any) -> None:
        if not end.open:
            return
        if isinstance(message, Closed):
            end.open = False
            end.on_end(message.reason)
            self._forget()
        else:
            end.on_message(message)

    def _forget(self) -> None:
        if not self.ends[0].open and not self.ends[1].open:
            self.network.forget(self)


class Network:
    def __init__(self, sim: Simulation, *, slow_rate: float) -> None:
        self.sim, self._slow_rate = sim, slow_rate
        self._silent: dict[tuple[str, str], int] = {}
        self._streams: dict[int, Stream] = {}
        self._made = 0

    @property
    def streams(self) -> list[Stream]:
        return list(self._streams.values())

    def delay_s(self) -> float:
        return self.sim.between(*(SLOW_DELAY_S if self.sim.chance(self._slow_rate) else DELAY_S))

    def passes(self, source: str, target: str) -> bool:
        return source == target or not self._silent.get((source, target))

    def both_ways(self, one: str, other: str) -> bool:
        return self.passes(one, other) and self.passes(other, one)

    def dial(self, dialler: Process, server: Process, *, accepted: Callable[[Stream], None]) -> Stream:
        """Make a stream; `accepted` runs at the server before anything said on it."""
        stream = Stream(self, dialler, server)
        self._made += 1
        stream.number = self._made
        self._streams[stream.number] = stream
        server.run(lambda: accepted(stream))
        return stream

    def forget(self, stream: Stream) -> None:
        self._streams.pop(stream.number, None)

    def silence(self, source: str, target: str) -> None:
        """Nothing passes from source to target any more; silences add up."""
        self._silent[source, target] = self._silent.get((source, target), 0) + 1
        for stream in self.streams:
            hosts = (stream.ends[0].process.host, stream.ends[1].process.host)
            if hosts in ((source, target), (target, source)):
                stream.disturbed()

    def heal(self, source: str, target: str) -> None:
        left = self._silent.get((source, target), 0) - 1
        self._silent[source, target] = max(0, left)
        if left > 0:
            return
        for stream in self.streams:
            hosts = (stream.ends[0].process.host, stream.ends[1].process.host)
            if hosts in ((source, target), (target, source)):
                stream.healed()

    def of(self, process: Process) -> list[Stream]:
        return [s for s in self.streams if s.ends[0].process is process or s.ends[1].process is process]

    def stalled(self, process: Process) -> None:
        for stream in self.of(process):
            stream.disturbed()

    def resumed(self, process: Process) -> None:
        for stream in self.of(process):
            stream.healed()

    def gone(self, process: Process, *, silently: bool) -> None:
        """A process ended: its kernel resets its streams, unless the whole host lost power."""
        for stream in self.of(process):
            side = 0 if stream.ends[0].process is process else 1
            stream.break_off(side, "the process ended", silently=silently)
