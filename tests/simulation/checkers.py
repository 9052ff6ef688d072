"""What must hold in every world, whatever fails in it. A breach is raised where it happens.

Judged from what is durable and from what really runs, never from what a core believes.
"""

from typing import TYPE_CHECKING

from elastic_run.agent.core import Aim
from elastic_run.controller.actions import Persist
from elastic_run.runtime.protocol.config import JobConfig
from elastic_run.runtime.protocol.messages import Install
from elastic_run.runtime.protocol.records import (
    LEADER_KEY,
    NODES_PREFIX,
    CurrentView,
    EventRecord,
    JobResult,
    JobState,
)
from elastic_run.runtime.protocol.view import Placement, View, ViewStatus

if TYPE_CHECKING:
    from simulation.etcd import Etcd
    from simulation.node import Node
    from simulation.world import World

FENCED_AFTER_S = 10.0
"""An agent that knows of a newer view, or could, has stopped its workers by then: their 5 s and a margin."""
REFUSALS_ALLOWED = ("is already there and alive", "is complete with")

_NEXT: dict[ViewStatus | None, tuple[ViewStatus, ...]] = {
    None: (ViewStatus.PROPOSED,),
    ViewStatus.PROPOSED: (ViewStatus.PREPARED, ViewStatus.ABANDONED),
    ViewStatus.PREPARED: (ViewStatus.PREPARED, ViewStatus.INSTALLED, ViewStatus.ABANDONED),
    ViewStatus.INSTALLED: (),
    ViewStatus.ABANDONED: (),
}


class Violation(AssertionError):
    """A promise was broken."""


class Checkers:
    def __init__(self, job: JobConfig) -> None:
        self.job = job
        self.etcd: Etcd | None = None
        self.views: dict[int, View] = {}
        self.current = 0
        self.result: JobResult | None = None
        self.leaders: dict[int, str] = {}
        #: steps made by a view after a disjoint newer one was installed (no agent of it could know)
        self.split_steps = 0
        self._sequence = 0
        self._acknowledged: set[tuple[str, str, int]] = set()
        self._finished: dict[int, set[int]] = {}
        self._stale_since: dict[str, tuple[float, float]] = {}

    # Leaders and what they make durable

    def led(self, candidate: str, token: int) -> None:
        known = self.leaders.get(token)
        if known is not None:
            raise Violation(f"{candidate} leads with token {token}, with which {known} led")
        self.leaders[token] = candidate

    def wrote(self, token: int, action: Persist) -> None:
        assert self.etcd is not None
        if self.etcd.created(LEADER_KEY) != token:
            raise Violation(f"a write under token {token} was applied while {self.etcd.created(LEADER_KEY)} leads")
        for put in action.puts:
            match put.record:
                case View():
                    self._view_written(put.record)
                case CurrentView(number=number):
                    self._current_written(number)
                case JobResult():
                    self._ended(put.record)
                case EventRecord(sequence=sequence):
                    if sequence != self._sequence + 1:
                        raise Violation(f"event {sequence} was written after {self._sequence}")
                    self._sequence = sequence
        if self.views.get(self.current) is None and self.current:
            raise Violation(f"view {self.current} is current and was never written")

    def _view_written(self, view: View) -> None:
        known = self.views.get(view.number)
        if known is None and self.views and view.number <= max(self.views):
            raise Violation(f"view {view.number} was proposed after view {max(self.views)}")
        if known is not None and known.members != view.members:
            raise Violation(f"the members of view {view.number} changed: its number was used twice")
        if view.status not in _NEXT[known.status if known else None]:
            raise Violation(f"view {view.number} went from {known.status if known else 'nothing'} to {view.status}")
        earlier = max((v.restart_count for v in self.views.values()), default=0)
        if not earlier <= view.restart_count <= min(self.job.max_restarts, earlier + 1):
            raise Violation(f"view {view.number} charges {view.restart_count} restarts after {earlier}")
        open_ones = [v.number for v in self.views.values() if v.status in (ViewStatus.PROPOSED, ViewStatus.PREPARED)]
        if known is None and open_ones:
            raise Violation(f"view {view.number} was proposed while {open_ones} are under way")
        if self.result is not None:
            raise Violation(f"view {view.number} was written after the job had ended")
        if view.status is ViewStatus.INSTALLED:
            self._installed(view)
        self.views[view.number] = view

    def _installed(self, view: View) -> None:
        if not self.job.nodes_min <= len(view.members) <= self.job.nodes_max:
            raise Violation(f"view {view.number} was installed with {len(view.members)} nodes")
        for member in view.members:
            if (member.node, member.incarnation, view.number) not in self._acknowledged:
                raise Violation(f"view {view.number} was installed and {member.incarnation} never acknowledged it")

    def _current_written(self, number: int) -> None:
        if number <= self.current:
            raise Violation(f"view {number} became current after view {self.current}")
        view = self.views.get(number)
        if view is None or view.status is not ViewStatus.INSTALLED:
            raise Violation(f"view {number} became current and is not installed")
        self.current = number

    def _ended(self, result: JobResult) -> None:
        if self.result is not None:
            raise Violation("the job ended twice")
        self.result = result
        if result.state is JobState.SUCCEEDED:
            view = self.views[self.current]
            finished = self._finished.get(view.number, set())
            if len(finished) != view.world_size:
                raise Violation(f"succeeded with {len(finished)} of {view.world_size} workers finished")
        elif "restart" in result.message:
            charged = max((v.restart_count for v in self.views.values()), default=0)
            if charged != self.job.max_restarts:
                raise Violation(f"failed with {charged} of {self.job.max_restarts} restarts: {result.message}")

    # Agents and workers

    def acknowledged(self, node: str, incarnation: str, view: int) -> None:
        self._acknowledged.add((node, incarnation, view))

    def starting(self, node: "Node", install: Install) -> None:
        view = self.views.get(install.view)
        if view is None or view.status is not ViewStatus.INSTALLED:
            raise Violation(
                f"{node.incarnation} starts workers of view {install.view}, which is not durable as installed"
            )
        if not view.holds(node.config.node, node.incarnation):
            raise Violation(f"{node.incarnation} starts workers of view {install.view} and is no member")
        first = Placement.of(view).first_ranks[install.group_rank]
        if (install.first_rank, install.world_size) != (first, view.world_size):
            raise Violation(
                f"{node.incarnation} got ranks from {install.first_rank} of view {install.view}, not {first}"
            )
        for crew in node.training.crews:
            if crew.alive and crew.agent.host == node.host:
                raise Violation(
                    f"{node.incarnation} starts view {install.view} while view {crew.install.view} runs there"
                )

    def stepped(self, number: int) -> None:
        view = self.views[number]
        for newer in self.views.values():
            if newer.number <= number or newer.status is not ViewStatus.INSTALLED:
                continue
            shared = [member.node for member in newer.members if member in view.members]
            if shared:
                raise Violation(f"view {number} made a step after view {newer.number}, which holds {shared} too")
            self.split_steps += 1

    def finished(self, view: int, rank: int, alive: bool) -> None:
        if alive:
            self._finished.setdefault(view, set()).add(rank)

    def looked(self, node: "Node") -> None:
        """A tick of an agent: workers of an older view must be gone soon after it knows, or can know, of a newer."""
        now = node.sim.now
        crew = node.crew
        could_know = node.client.reaches() and self.current > (crew.install.view if crew else 0)
        knows = crew is not None and node.core.current_view > crew.install.view
        if crew is None or not crew.alive or not (could_know or knows):
            self._stale_since.pop(node.name, None)
            return
        since, last = self._stale_since.get(node.name, (now, now))
        if now - last > 2 * node.config.monitor_interval_s:
            since = now  # it stood still meanwhile
        self._stale_since[node.name] = (since, now)
        allowed_s = FENCED_AFTER_S + (self.etcd.lag_s_max if self.etcd is not None else 0.0)
        if node.core.aim is Aim.EXIT:
            allowed_s += node.config.shutdown_timeout_s  # its user stops it, and gives its workers that long
        if now - since > allowed_s:
            raise Violation(
                f"{node.incarnation} runs view {crew.install.view} {now - since:.1f} s after {self.current}"
            )

    def exited(self, node: "Node") -> None:
        code, said = node.exit_code, node.refused or node.said
        state = self.result.state if self.result is not None else None
        if code is None or code >= 128:
            return
        if code == 0 and state is not JobState.SUCCEEDED:
            raise Violation(f"{node.incarnation} exits with 0 and the job is {state}")
        if said.startswith("refused: "):
            if not any(allowed in said for allowed in REFUSALS_ALLOWED):
                raise Violation(f"{node.incarnation} was turned away: {said}")
        elif code != 0 and state is not JobState.FAILED and "did not form" not in said:
            raise Violation(f"{node.incarnation} exits with {code} and the job is {state}: {said}")

    # The end

    def nothing_leaks(self, world: "World") -> None:
        etcd = world.etcd
        left = [f"agent {node.name}" for node in world.nodes.values() if node.alive]
        left += [f"candidate {c.name}" for c in world.candidates.values() if c.alive]
        left += [f"workers of {c.agent.name}" for c in world.training.crews if c.alive]
        left += [f"lease {lease}" for lease in etcd.leases]
        left += [key for key in sorted(etcd.keys) if key.startswith(NODES_PREFIX) or key == LEADER_KEY]
        left += [f"stream {s.ends[0].process.name}-{s.ends[1].process.name}" for s in world.network.streams]
        if left:
            raise Violation(f"left behind: {', '.join(left)}")
