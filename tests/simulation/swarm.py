"""Everything a world draws from its seed: sizes, rates, and which faults happen when.

Each world allows a random part of the faults only: what a rare fault hides, a world without the loud ones shows.
"""

import dataclasses
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simulation.etcd import HOST

if TYPE_CHECKING:
    from simulation.world import World

FAULTS = (
    "kill_agent",
    "lose_host",
    "stall_agent",
    "stall_host",
    "leave",
    "fail_worker",
    "crash_worker",
    "kill_candidate",
    "stall_candidate",
    "break_stream",
    "silence_one_way",
    "silence_both_ways",
    "isolate",
    "etcd_outage",
    "compact",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One world, as printed when it fails."""

    nodes: int
    candidates: int
    shared_hosts: bool
    """Candidates live on the nodes' hosts."""
    nodes_min: int
    nodes_max: int
    nproc: int
    max_restarts: int
    last_call_s: float
    step_s: float
    steps_total: int
    ignore_term: bool
    raises_at: int | None
    lag_s_max: float
    uncertain_rate: float
    slow_rate: float
    faults: tuple[str, ...]
    fault_gap_s: float
    """Mean time between two faults."""
    safety_s: float


def draw(seed: int) -> Options:
    rng = random.Random(seed)
    nodes = rng.randint(2, 5)
    nodes_max = rng.randint(1, nodes)
    nodes_min = rng.randint(1, nodes_max)
    return Options(
        nodes=nodes,
        candidates=rng.randint(2, 3),
        shared_hosts=rng.random() < 0.5,
        nodes_min=nodes_min,
        nodes_max=nodes_max,
        nproc=rng.randint(1, 2),
        max_restarts=rng.choice((0, 1, 3, 10)),
        last_call_s=rng.choice((0.0, 0.5, 3.0)),
        step_s=rng.choice((0.1, 0.4, 1.0)),
        steps_total=rng.choice((20, 100, 1000)),
        ignore_term=rng.random() < 0.2,
        raises_at=rng.choice((None, None, None, None, None, 12)),
        lag_s_max=rng.choice((0.005, 0.2, 3.0)),
        uncertain_rate=rng.choice((0.0, 0.0, 0.01, 0.1)),
        slow_rate=rng.choice((0.0, 0.05, 0.5)),
        faults=tuple(fault for fault in FAULTS if rng.random() < 0.45),
        fault_gap_s=rng.choice((0.5, 2.0, 6.0)),
        safety_s=rng.choice((10.0, 25.0, 40.0)),
    )


def without_faults(options: Options, **changes: object) -> Options:
    """The same world left in peace, for scenarios that bring their own faults."""
    return dataclasses.replace(options, faults=(), raises_at=None, uncertain_rate=0.0, **changes)  # type: ignore[arg-type]


class Swarm:
    """Brings faults upon a world until told to stop, then takes all of them back."""

    def __init__(self, world: "World") -> None:
        self._world, self._sim = world, world.sim
        self._active = True
        #: what ends a fault that lasts, by number
        self._cures: dict[int, Callable[[], None]] = {}
        self._cured = 0
        if world.options.faults:
            self._next()

    def calm(self) -> None:
        """No fault from now on; what lasts ends."""
        self._active = False
        for number in tuple(self._cures):
            self._cure(number)

    def _next(self) -> None:
        gap_s = self._sim.rng.expovariate(1.0 / self._world.options.fault_gap_s)
        self._sim.at(gap_s, self._strike)

    def _strike(self) -> None:
        if not self._active:
            return
        fault = self._sim.rng.choice(self._world.options.faults)
        getattr(self, f"_{fault}")()
        self._next()

    def lasting(self, seconds: float, cure: Callable[[], None]) -> None:
        """Take something back after a while, or when the world calms down."""
        self._cured += 1
        number = self._cured
        self._cures[number] = cure
        self._sim.at(seconds, lambda: self._cure(number))

    def _cure(self, number: int) -> None:
        cure = self._cures.pop(number, None)
        if cure is not None:
            cure()

    # Faults

    def _restart_node_later(self, name: str) -> None:
        if self._sim.chance(0.8):
            self._sim.at(self._sim.between(0.3, 8.0), lambda: self._world.start_node(name))

    def _kill_agent(self) -> None:
        node = self._world.pick_node()
        if node is not None:
            node.kill()
            self._restart_node_later(node.config.node)

    def _lose_host(self) -> None:
        node = self._world.pick_node()
        if node is None:
            return
        node.kill(silently=True)
        self._restart_node_later(node.config.node)
        for candidate in self._world.candidates.values():
            if candidate.alive and candidate.host == node.host:
                candidate.kill(silently=True)
                self._restart_candidate_later(candidate.name)

    def _stall_agent(self) -> None:
        node = self._world.pick_node()
        if node is not None and not node.stalled:
            node.stall()
            self.lasting(self._sim.between(0.1, 7.0), node.resume)

    def _stall_host(self) -> None:
        node = self._world.pick_node()
        if node is not None and not node.stalled:
            node.stall_host()
            self.lasting(self._sim.between(0.1, 7.0), node.resume)

    def _leave(self) -> None:
        node = self._world.pick_node()
        if node is not None:
            node.tell("gets SIGTERM")
            node.signal(signal.SIGTERM)
            self._restart_node_later(node.config.node)

    def _fail_worker(self) -> None:
        self._end_worker(1, None)

    def _crash_worker(self) -> None:
        self._end_worker(None, signal.SIGSEGV)

    def _end_worker(self, code: int | None, number: int | None) -> None:
        workers = [w for crew in self._world.training.crews for w in crew.workers if w.alive]
        if workers:
            self._sim.rng.choice(workers).exit(code, number, "fails by itself")

    def _kill_candidate(self) -> None:
        candidate = self._world.pick_candidate()
        if candidate is not None:
            candidate.kill()
            self._restart_candidate_later(candidate.name)

    def _restart_candidate_later(self, name: str) -> None:
        self._sim.at(self._sim.between(0.05, 3.0), lambda: self._world.start_candidate(name))

    def _stall_candidate(self) -> None:
        candidate = self._world.pick_candidate()
        if candidate is not None and not candidate.stalled:
            candidate.stall()
            self.lasting(self._sim.between(0.1, 8.0), candidate.resume)

    def _break_stream(self) -> None:
        streams = self._world.network.streams
        if streams:
            self._sim.rng.choice(streams).break_off(self._sim.rng.randrange(2), "a fault")

    def _silence(self, source: str, target: str, seconds: float) -> None:
        if source != target:
            self._sim.tell("network", f"silent {source} -> {target}")
            self._world.network.silence(source, target)
            self.lasting(seconds, lambda: self._world.network.heal(source, target))

    def _two_hosts(self) -> tuple[str, str]:
        one, other = self._sim.rng.sample(self._world.hosts, 2)
        return one, other

    def _silence_one_way(self) -> None:
        self._silence(*self._two_hosts(), self._sim.between(0.1, 9.0))

    def _silence_both_ways(self) -> None:
        one, other = self._two_hosts()
        seconds = self._sim.between(0.1, 9.0)
        self._silence(one, other, seconds)
        self._silence(other, one, seconds)

    def _isolate(self) -> None:
        lonely = self._sim.rng.choice([host for host in self._world.hosts if host != HOST])
        seconds = self._sim.between(0.5, 12.0)
        for host in self._world.hosts:
            self._silence(lonely, host, seconds)
            self._silence(host, lonely, seconds)

    def _etcd_outage(self) -> None:
        self._world.etcd.begin_outage()
        self.lasting(self._sim.between(0.2, 20.0), self._world.etcd.end_outage)

    def _compact(self) -> None:
        self._sim.tell(HOST, "compacts")
        self._world.etcd.compact()
