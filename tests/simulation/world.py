"""One seeded world: nodes, candidates, etcd, network, workers, and two phases to live through.

Safety phase: faults as the swarm draws them; the checkers hold all the time. Liveness phase: faults stop; within
LIVENESS_S the job ended, or all living nodes up to MAX run in one view. Then the job must end, and nothing may be left.
"""

import signal
from collections.abc import Callable
from functools import partial

from simulation.candidate import Candidate
from simulation.checkers import Checkers, Violation
from simulation.clock import Simulation
from simulation.etcd import HOST, Etcd
from simulation.network import Network
from simulation.node import Node
from simulation.swarm import Options, Swarm, draw
from simulation.workers import Training

from elastic_run.agent.core import AgentCore, Aim
from elastic_run.controller.core import ControllerCore
from elastic_run.controller.events import TermBegan
from elastic_run.runtime.protocol.config import (
    AgentConfig,
    CommandConfig,
    Entrypoint,
    JobConfig,
    OutputConfig,
    StoreConfig,
)
from elastic_run.runtime.protocol.ids import JobId, NodeId
from elastic_run.runtime.protocol.messages import AgentPhase
from elastic_run.runtime.protocol.records import JobState
from elastic_run.runtime.protocol.view import ViewStatus

LIVENESS_S = 45.0
"""Lease, adoption, last call, safe point and stop together are below 30 s; a node given up only for ISOLATION_S
(60 s), because nobody noticed its lease go, is late."""
END_S = 45.0
STEPS_TO_THE_END = 3
OWN_FAILURES = ("fails by itself", "raises at its step", "lost its peer")
OWN_FAILURES_S = 15.0
"""Failures the swarm brought about are judged by then after it became calm; a controller had to be found first."""


class World:
    def __init__(
        self,
        seed: int,
        options: Options | None = None,
        *,
        controller_core: Callable[[TermBegan], ControllerCore] = ControllerCore,
        agent_core: Callable[[AgentConfig, float], AgentCore] = AgentCore,
        candidate: type[Candidate] = Candidate,
    ) -> None:
        self.seed = seed
        self.options = o = options or draw(seed)
        self.sim = Simulation(seed)
        self._controller_core, self._agent_core, self._candidate = controller_core, agent_core, candidate
        self.job = JobConfig(
            job_id=JobId("sim"),
            nodes_min=o.nodes_min,
            nodes_max=o.nodes_max,
            max_restarts=o.max_restarts,
            last_call_s=o.last_call_s,
        )
        self.checkers = Checkers(self.job)
        self.network = Network(self.sim, slow_rate=o.slow_rate)
        self.etcd = Etcd(self.sim, self.network, lag_s_max=o.lag_s_max, uncertain_rate=o.uncertain_rate)
        self.checkers.etcd = self.etcd
        self.training = Training(
            self.sim,
            self.network,
            self.checkers,
            step_s=o.step_s,
            steps_total=o.steps_total,
            ignore_term=o.ignore_term,
        )
        self.training.raises_at = o.raises_at
        self.nodes: dict[str, Node] = {}
        self.candidates: dict[str, Candidate] = {}
        #: told of every candidate that is started
        self.on_candidate: Callable[[Candidate], None] = lambda _: None
        #: agents that nobody told of the job's end
        self.cut_off: list[str] = []
        self._at_peace, self._calm_at = False, 0.0
        self.lives: dict[str, int] = {}
        self._names = [f"n{i}" for i in range(o.nodes)]
        self._candidate_hosts = {
            f"c{i}": f"host-n{i % o.nodes}" if o.shared_hosts else f"host-c{i}" for i in range(o.candidates)
        }
        self.hosts = list(dict.fromkeys([HOST, *(f"host-{n}" for n in self._names), *self._candidate_hosts.values()]))
        for name in self._candidate_hosts:
            self.sim.at(self.sim.between(0.0, 1.0), partial(self.start_candidate, name))
        for name in self._names:
            self.sim.at(self.sim.between(0.0, 2.0), partial(self.start_node, name))
        self.swarm = Swarm(self)

    # Parts

    def start_candidate(self, name: str) -> None:
        """Start a candidate as its launcher does: not while one lives, not after one returned."""
        known = self.candidates.get(name)
        if known is not None and (known.alive or known.returned):
            return
        candidate = self._candidate(
            self.sim,
            name,
            self._candidate_hosts[name],
            job=self.job,
            etcd=self.etcd,
            network=self.network,
            checkers=self.checkers,
            core_of=self._controller_core,
        )
        self.candidates[name] = candidate
        candidate.tell("starts")
        self.on_candidate(candidate)

    def start_node(self, name: str) -> None:
        """Start an agent, unless one lives or was sent away, or the job is over."""
        known = self.nodes.get(name)
        if self.checkers.result is not None:
            return
        if known is not None and (known.alive or (known.exit_code in (0, 1, 2) and not self._at_peace)):
            return
        self.lives[name] = self.lives.get(name, 0) + 1
        config = AgentConfig(
            job=self.job,
            store=StoreConfig(endpoints=("sim",)),
            node=NodeId(name),
            node_rank=None,
            address=name,
            nproc=self.options.nproc,
            role="default",
            command=CommandConfig(entrypoint=Entrypoint.SCRIPT, target="train.py", args=(), python="python"),
            output=OutputConfig(
                log_dir=None, redirects="0", tee="0", local_ranks_filter=None, stdout_filters=(), stderr_filters=()
            ),
            run_dir="",
        )
        node = Node(
            self.sim,
            config,
            life=self.lives[name],
            core_of=self._agent_core,
            etcd=self.etcd,
            network=self.network,
            training=self.training,
            controllers=lambda: self.candidates,
        )
        self.nodes[name] = node
        node.tell("starts")

    @property
    def leader(self) -> Candidate | None:
        """A candidate that believes it leads."""
        return next((c for c in self.candidates.values() if c.leading), None)

    def alive(self) -> list[Node]:
        """Nodes that take part: not those on their way out."""
        return [node for node in self.nodes.values() if node.alive and node.core.aim is not Aim.EXIT]

    def pick_node(self) -> Node | None:
        alive = self.alive()
        return self.sim.rng.choice(alive) if alive else None

    def pick_candidate(self) -> Candidate | None:
        alive = [c for c in self.candidates.values() if c.alive]
        leading = [c for c in alive if c.leading]
        choice = leading if leading and self.sim.chance(0.7) else alive
        return self.sim.rng.choice(choice) if choice else None

    # Phases

    def live(self) -> None:
        """Live through both phases to the end. Raises Violation."""
        self.sim.run_until(self.sim.now + self.options.safety_s)
        self.become_calm()
        self.expect(self.settled, LIVENESS_S, "the job neither ended nor runs with all its nodes")
        self.finish()

    def become_calm(self) -> None:
        """End all faults, start what died: every candidate, and nodes until MIN are there, some of the others."""
        self.sim.tell("world", "becomes calm")
        self.swarm.calm()
        self.training.raises_at = None
        for name in self._candidate_hosts:
            self.sim.at(self.sim.between(0.05, 2.0), partial(self.start_candidate, name))
        self._at_peace, self._calm_at = True, self.sim.now
        self._fill_up(others=True)

    def _fill_up(self, *, others: bool = False) -> None:
        """Users start agents again until MIN are there, also where one was sent away; `others`: some more at first."""
        missing = self.options.nodes_min - len(self.alive())
        for name in self._names:
            known = self.nodes.get(name)
            if (known is None or not known.alive) and (missing > 0 or (others and self.sim.chance(0.5))):
                missing -= 1
                self.sim.at(self.sim.between(1.1, 3.0), partial(self.start_node, name))
        self.sim.at(4.0, self._fill_up)

    def expect(self, done: Callable[[], bool], seconds: float, otherwise: str) -> None:
        if not self.sim.run_until(self.sim.now + seconds, done):
            raise Violation(f"{otherwise} within {seconds:g} s: {self.picture()}")

    def settled(self) -> bool:
        if self.checkers.result is not None:
            return True
        alive = self.alive()
        view = self.checkers.views.get(self.checkers.current)
        tried = (v.number for v in self.checkers.views.values() if v.status is not ViewStatus.ABANDONED)
        if view is None or view.number != max(tried) or self.leader is None:
            return False
        members = [node for node in alive if view.holds(node.config.node, node.incarnation)]
        return len(members) == len(view.members) == min(len(alive), self.options.nodes_max) and all(
            node.core.phase in (AgentPhase.RUNNING, AgentPhase.FINISHED) and node.core.view == view.number
            for node in members
        )

    def finish(self) -> None:
        """Let the job end, and see that it did well and nothing is left."""
        self.training.steps_total = min(self.training.steps_total, self.training.progress + STEPS_TO_THE_END)
        unended = self.checkers.result is None
        self.expect(lambda: self.checkers.result is not None, END_S, "the workers can finish and the job did not end")
        result = self.checkers.result
        ours = (
            result is not None
            and result.at <= self._calm_at + OWN_FAILURES_S
            and any(fault in result.message for fault in OWN_FAILURES)
        )
        if unended and result is not None and result.state is not JobState.SUCCEEDED and not ours:
            raise Violation(f"left in peace, the job failed: {result.message}")
        if not unended:
            self._stop_the_cut_off()
        self.sim.run_until(self.sim.now + 3.0)  # launchers start dead candidates again
        self.expect(self._all_gone, END_S, "the job has ended and somebody stays")
        self.sim.run_until(self.sim.now + 5.0)  # leases of those who could not say goodbye
        self.checkers.nothing_leaks(self)

    def _stop_the_cut_off(self) -> None:
        """Agents that had no controller when the job ended, nor since, wait until their users stop them."""
        self.expect(lambda: not any(c.alive for c in self.candidates.values()), END_S, "controllers stay")
        self.sim.run_until(self.sim.now + 5.0)
        for node in self.alive():
            if node.core.connected:
                raise Violation(f"{node.name} was connected to the last controller and was not told of the end")
            self.cut_off.append(node.name)
            node.signal(signal.SIGTERM)

    def _all_gone(self) -> bool:
        return not any(node.alive for node in self.nodes.values()) and not any(
            candidate.alive for candidate in self.candidates.values()
        )

    def picture(self) -> str:
        """The state of the world in a few words."""
        views = [
            f"{v.number} {v.status} of {','.join(m.incarnation for m in v.members)}"
            for v in self.checkers.views.values()
            if v.status is not ViewStatus.ABANDONED
        ][-2:]
        nodes = [
            f"{n.name} {n.core.phase} {n.core.view} of {n.core.current_view}"
            if n.alive
            else f"{n.name} gone {n.exit_code}"
            for n in self.nodes.values()
        ]
        leader = self.leader
        waits = ""
        if leader is not None and leader.term is not None:
            core = leader.term.core
            waits = f"; {leader.name} leads, waits for {core.waiting_for!r}"
        return f"views {views}; {'; '.join(nodes)}{waits}; result {self.checkers.result}"
