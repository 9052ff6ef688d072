"""Workers as counters of steps: they meet, step together, park, finish, fail, and fail with their peers as gloo would.

`Training` is the script's own state: the newest snapshot, from which each new gang of workers goes on.
Not here: who starts and stops them (node.py), which of them fail (swarm.py).
"""

import signal
from collections.abc import Callable
from functools import partial

from simulation.checkers import Checkers
from simulation.clock import Process, Simulation
from simulation.network import Network

from elastic_run.runtime.protocol.ids import ViewNumber
from elastic_run.runtime.protocol.messages import Failure, Install

STARTUP_S = (0.05, 0.6)
PEER_FAILURE_S = (0.005, 0.25)
"""Below the core's settling time, as a reset is."""
FINISH_SPREAD_S = 0.3
MEETING_TIMEOUT_S = 30.0
SILENT_PEER_TIMEOUT_S = 20.0
TERM_S = (0.005, 0.3)

GangKey = tuple[int, str, int, int]
"""View, master address and port, world size."""


class Worker:
    """One process. `on_exit` hears how it ended, once."""

    def __init__(self, crew: "Crew", local_rank: int) -> None:
        self.crew, self.local_rank = crew, local_rank
        self.rank = crew.install.first_rank + local_rank
        self.alive, self.met, self.finishing = True, False, False
        self.steps = 0
        self.parked = False

    @property
    def stalled(self) -> bool:
        return self.crew.stalled

    def exit(self, code: int | None, signal_number: int | None, message: str) -> None:
        if not self.alive:
            return
        self.alive = False
        self.crew.exited(self, code, signal_number, message)


class Crew:
    """One node's workers of one view."""

    def __init__(
        self,
        training: "Training",
        agent: Process,
        install: Install,
        nproc: int,
        report: Callable[[ViewNumber, int, Failure | None], None],
    ) -> None:
        self.training, self.agent, self.install, self._report = training, agent, install, report
        self.stalled = False
        self.park_at: int | None = None
        self.on_parked: Callable[[], None] = lambda: None
        self.stopping = False
        self._on_stopped: list[Callable[[], None]] = []
        self.workers = [Worker(self, i) for i in range(nproc)]
        training.enrol(self)

    @property
    def alive(self) -> int:
        return sum(worker.alive for worker in self.workers)

    @property
    def steps(self) -> int:
        return max((worker.steps for worker in self.workers), default=0)

    def exited(self, worker: Worker, code: int | None, signal_number: int | None, message: str) -> None:
        failure = None
        if code != 0 or signal_number is not None:
            failure = Failure(
                node=self.agent.name.split(".")[0],  # type: ignore[arg-type]
                rank=worker.rank,
                local_rank=worker.local_rank,
                pid=1000 + worker.rank,
                exit_code=code,
                signal=signal_number,
                message=message,
                traceback="",
                age_s=0.0,
            )
        self.training.sim.tell(self.agent.name, f"rank {worker.rank} of view {self.install.view} ends: {message}")
        self.training.left(worker, failed=failure is not None)
        self.agent.run(lambda: self._report(self.install.view, worker.local_rank, failure))
        self._look_stopped()

    def kill(self, *, silently: bool = False) -> None:
        """The agent died: the parent-death signal takes the workers at once. Silently: peers hear no reset."""
        for worker in self.workers:
            if silently:
                worker.alive = False
            worker.exit(None, signal.SIGKILL, "died with its agent")

    def stop(self, term_s: float, on_stopped: Callable[[], None] | None = None) -> None:
        """Signal all, kill what is left after `term_s`; asked again, only the patience gets shorter."""
        sim = self.training.sim
        if on_stopped is not None:
            self._on_stopped.append(on_stopped)
        for worker in self.workers:
            if worker.alive:
                wait_s = sim.between(*TERM_S)
                if self.training.ignore_term or wait_s > term_s:
                    wait_s = term_s
                sim.at(wait_s, partial(self._struck, worker))
        self.stopping = True
        self._look_stopped()

    def _struck(self, worker: Worker) -> None:
        if not self.stalled:
            worker.exit(None, signal.SIGTERM, "was stopped")
        elif worker.alive:  # the whole host stands still
            self.training.sim.at(0.1, lambda: self._struck(worker))

    def ask_to_park(self, step: int, on_parked: Callable[[], None]) -> None:
        self.park_at, self.on_parked = step, on_parked

    def look_parked(self) -> None:
        if self.park_at is not None and self.alive and all(w.parked for w in self.workers if w.alive):
            self.park_at = None
            self.agent.run(self.on_parked)

    def _look_stopped(self) -> None:
        if self.stopping and not self.alive:
            waiting, self._on_stopped = self._on_stopped, []
            for callback in waiting:
                self.agent.after(self.training.sim.between(0.0005, 0.01), callback)


class Gang:
    """All workers of a view that met under one master."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.crews: list[Crew] = []
        self.running = False
        self.silent_s = 0.0
        self.over = False

    @property
    def workers(self) -> list[Worker]:
        return [worker for crew in self.crews for worker in crew.workers]


class Training:
    def __init__(
        self,
        sim: Simulation,
        network: Network,
        checkers: Checkers,
        *,
        step_s: float,
        steps_total: int,
        ignore_term: bool,
    ) -> None:
        self.sim, self.network, self.checkers = sim, network, checkers
        self.step_s, self.steps_total, self.ignore_term = step_s, steps_total, ignore_term
        #: steps in the newest snapshot
        self.progress = 0
        #: a bug in the script: it raises at this step, always
        self.raises_at: int | None = None
        self._gangs: dict[GangKey, Gang] = {}
        self.crews: list[Crew] = []

    def enrol(self, crew: Crew) -> None:
        self.crews = [known for known in self.crews if known.alive] + [crew]
        self.sim.at(self.sim.between(*STARTUP_S), lambda: self._meet(crew))

    def _meet(self, crew: Crew) -> None:
        if not crew.alive or crew.stopping:
            return
        install = crew.install
        key = (install.view, install.master_addr, install.master_port, install.world_size)
        gang = self._gangs.setdefault(key, Gang(install.world_size))
        if gang.over:
            self._fail(crew, "its peers are gone")
            return
        gang.crews.append(crew)
        if sum(len(c.workers) for c in gang.crews) >= gang.world_size:
            if all(worker.alive for worker in gang.workers):
                gang.running = True
                for worker in gang.workers:
                    worker.met = True
                self.sim.at(self.step_s, lambda: self._step(gang, self.progress))
        else:
            self.sim.at(MEETING_TIMEOUT_S, lambda: self._meeting_over(gang, crew))

    def _meeting_over(self, gang: Gang, crew: Crew) -> None:
        if not gang.running and crew.alive:
            gang.over = True
            self._fail(crew, "its peers did not come")

    def _fail(self, crew: Crew, why: str) -> None:
        for worker in crew.workers:
            if not worker.finishing:
                worker.exit(1, None, why)

    def _step(self, gang: Gang, base: int) -> None:
        if gang.over or not any(worker.alive for worker in gang.workers):
            return
        workers = gang.workers
        if self._can_step(gang):
            gang.silent_s = 0.0
            if self.raises_at is not None and base + workers[0].steps + 1 >= self.raises_at:
                workers[0].exit(1, None, "raises at its step")
                return
            self.checkers.stepped(gang.crews[0].install.view)
            for worker in workers:
                worker.steps += 1
            self.progress = max(self.progress, base + workers[0].steps)
            if base + workers[0].steps >= self.steps_total:
                gang.over = True
                for worker in workers:
                    worker.finishing = True
                    self.sim.at(self.sim.between(0.0, FINISH_SPREAD_S), partial(self._finish, worker))
                return
            self._park(gang)
        elif not self._connected(gang):
            gang.silent_s += self.step_s
            if gang.silent_s >= SILENT_PEER_TIMEOUT_S:
                for crew in gang.crews:
                    self._fail(crew, "a peer is silent")
                return
        self.sim.at(self.step_s, lambda: self._step(gang, base))

    def _finish(self, worker: Worker) -> None:
        if worker.stalled:
            self.sim.at(0.1, lambda: self._finish(worker))
        else:
            self.checkers.finished(worker.crew.install.view, worker.rank, worker.alive)
            worker.exit(0, None, "finished")

    def _park(self, gang: Gang) -> None:
        for crew in gang.crews:
            for worker in crew.workers:
                worker.parked = crew.park_at is not None and worker.steps >= crew.park_at
            crew.look_parked()

    def _can_step(self, gang: Gang) -> bool:
        ready = all(w.alive and not w.parked and not w.stalled for w in gang.workers)
        self._park(gang)
        return ready and not any(w.parked for w in gang.workers) and self._connected(gang)

    def _connected(self, gang: Gang) -> bool:
        hosts = [crew.agent.host for crew in gang.crews]
        return all(self.network.both_ways(a, b) for i, a in enumerate(hosts) for b in hosts[i + 1 :])

    def left(self, worker: Worker, *, failed: bool) -> None:
        """A worker ended: its peers' sockets break, unless they wait at a safe point or are done."""
        install = worker.crew.install
        key = (install.view, install.master_addr, install.master_port, install.world_size)
        gang = self._gangs.get(key)
        if not failed or gang is None or not worker.met or worker.finishing:
            return
        for peer in gang.workers:
            if peer.alive and peer is not worker:
                self.sim.at(self.sim.between(*PEER_FAILURE_S), partial(self._peer_lost, worker, peer))

    def _peer_lost(self, lost: Worker, peer: Worker) -> None:
        if not peer.alive or peer.parked or peer.finishing or peer.crew.stopping:
            return
        if peer.stalled or not self.network.passes(lost.crew.agent.host, peer.crew.agent.host):
            self.sim.at(0.2, lambda: self._peer_lost(lost, peer))
        else:
            peer.exit(1, None, f"lost its peer, rank {lost.rank}")
