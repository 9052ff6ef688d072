"""The controller's decisions: who is in the job, which view comes next, when the job has ended.

handle(event) -> actions; no await, clock, I/O or randomness. One core is one term of one leader; the next term begins
from what etcd holds.

Invariants (validate(), tests/unit/test_controller_*.py, tests/simulation):
1. View numbers only grow; a change is proposed only when the one before is installed or abandoned in the same write.
2. A view is installed only when every member acknowledged it, and has nodes_min to nodes_max members.
3. Nothing is sent that is not durable first. 4. A dead or unknown node is never a member of a new view.
5. Losses push a view at once; joins ride on a step boundary, and never while a member has finished.
Source: DESIGN section 4; last call and restart budget as in torch's dynamic rendezvous and elastic agent.
Not here: is a node alive (suspicion.py), how members stand (standing.py), may a view form (quorum.py), what a failure
costs (blame.py), what members are told (assignment.py), I/O (driver.py).
"""

import dataclasses
from typing import assert_never

from elastic_run.controller import admission, assignment, blame, quorum, standing
from elastic_run.controller.actions import Action, CloseConnection, EndJob, Persist, Put, Send
from elastic_run.controller.change import Change, advance
from elastic_run.controller.events import (
    AgentConnected,
    AgentDisconnected,
    AgentSpoke,
    ControllerEvent,
    NodeLeaseGone,
    NodeLeaseSeen,
    TermBegan,
    Ticked,
)
from elastic_run.controller.journal import Journal
from elastic_run.controller.node import Node
from elastic_run.controller.roster import Roster
from elastic_run.controller.suspicion import Condition
from elastic_run.runtime.protocol.config import JobConfig
from elastic_run.runtime.protocol.errors import InvariantViolated
from elastic_run.runtime.protocol.ids import NAME_LENGTH_MAX, NodeId, ViewNumber
from elastic_run.runtime.protocol.messages import (
    AgentPhase,
    AgentState,
    Failure,
    Heartbeat,
    Hello,
    Install,
    JobEnded,
    Leaving,
    Prepare,
    Prepared,
    Refused,
    Welcome,
    WorkersFailed,
    WorkersFinished,
)
from elastic_run.runtime.protocol.records import (
    CURRENT_KEY,
    RESULT_KEY,
    SPEC_KEY,
    CurrentView,
    EventKind,
    JobResult,
    JobState,
    view_key,
)
from elastic_run.runtime.protocol.view import Member, View, ViewStatus

FAILURE_SETTLE_S = 0.3
"""Time given to other nodes' failures and to a broken stream to arrive before a worker failure is judged."""
JOIN_SETTLE_S = 0.5
"""Nodes that arrive together are taken in together."""
PREPARE_TIMEOUT_S = 60.0
"""A member that has not reached its safe point by then is left out; agents stop workers within 5 s plus the kill."""
QUIET_S, QUIET_SETTLED_S = 0.05, 0.25
"""Heartbeats that say nothing new are weighed no more often: a large job has thousands of them each second."""


class ControllerCore:
    """One term. `began` holds what etcd held when the leader's key was won."""

    def __init__(self, began: TermBegan) -> None:
        records = began.records
        self.token, self.candidate = began.token, began.candidate
        self.spec = records.spec or began.fresh_spec
        self.result = records.result
        self.roster = Roster()
        self.journal = Journal(records.events)
        #: the newest installed view
        self.view = next((v for v in reversed(records.views) if v.status is ViewStatus.INSTALLED), None)
        #: the view change under way
        self.change: Change | None = None
        #: highest number ever proposed
        self.highest = max((v.number for v in records.views), default=ViewNumber(0))
        self.restarts_used = max((v.restart_count for v in records.views), default=0)
        #: failures of the installed view that no decision has answered yet
        self.failures = blame.Failures()
        #: what keeps a view from forming; empty when nothing does
        self.waiting_for = ""
        self._enough_since: float | None = None
        self._short_since: float | None = None
        self._joiner_since: float | None = None
        #: nothing waits for a time-out shorter than a second: the driver may tick slowly
        self.settled = False
        self._now = self._weighed_at = began.now
        self._out: list[Action] = []
        self._write_spec = records.spec is None
        last = records.views[-1] if records.views else None
        if last is not None and last.status in (ViewStatus.PROPOSED, ViewStatus.PREPARED):
            self.change = Change(view=last, begun_at=began.now)
        for view in (last, self.view):  # of two incarnations of a name the newer one counts
            self.roster.adopt(view.members if view else (), began.now)
        for record in records.nodes:
            self.roster.lease_seen(record.node, record.incarnation)

    @property
    def job(self) -> JobConfig:
        return self.spec.job

    def _is_settled(self) -> bool:
        alive = all(node.condition is Condition.ALIVE for node in self.roster)
        return alive and self.change is None and not self.failures and self._joiner_since is None

    def begin(self, wall: float) -> list[Action]:
        """Return what a new leader does before anything else."""
        self.journal.wall = wall
        if self._write_spec:
            self._out.append(Persist(puts=(Put(key=SPEC_KEY, record=self.spec, create=True),)))
        self.journal.note(EventKind.LEADER_ELECTED, f"controller {self.candidate} leads with token {self.token}")
        return self._flush()

    def handle(self, event: ControllerEvent) -> list[Action]:
        """Take one event, return what is to be done, in order."""
        self._now, self.journal.wall = event.now, event.wall
        weigh = self.result is None and not self._says_nothing_new(event)
        self._take(event)
        if weigh and self.result is None:
            self._weighed_at = event.now
            self._judge()
            self._decide()
            self.settled = self._is_settled()
        return self._flush()

    def _says_nothing_new(self, event: ControllerEvent) -> bool:
        if not isinstance(event, AgentSpoke) or not isinstance(event.message, Heartbeat):
            return False
        node, said = self.roster.of(event.connection), event.message.state
        if node is None or node.stuck or node.condition is not Condition.ALIVE:
            return False
        pause_s = QUIET_SETTLED_S if self.settled else QUIET_S
        return (node.state.view, node.state.phase) == (said.view, said.phase) and event.now - self._weighed_at < pause_s

    def _flush(self) -> list[Action]:
        actions, self._out = self.journal.weave(self._out), []
        return actions

    def _take(self, event: ControllerEvent) -> None:
        match event:
            case AgentConnected():
                self._connected(event.connection, event.hello)
            case AgentSpoke():
                node = self.roster.of(event.connection)
                if node is not None:
                    self._spoke(node, event)
            case AgentDisconnected():
                self.roster.disconnected(event.connection, event.now)
            case NodeLeaseSeen():
                self.roster.lease_seen(event.record.node, event.record.incarnation)
            case NodeLeaseGone():
                self.roster.lease_gone(event.node, event.incarnation)
            case Ticked():
                pass
            case _:
                assert_never(event)

    # Agents

    def _connected(self, connection: int, hello: Hello) -> None:
        if self.result is not None:
            self._send_result(connection, self.result)
            return
        reason = admission.why_refuse(hello, self.spec, self.roster, self.view, changing=self.change is not None)
        if reason:
            name = hello.node[:NAME_LENGTH_MAX]  # a stranger may call itself anything
            self.journal.note(EventKind.NODE_REFUSED, f"node {name} was refused: {reason}", node=name)
            self._send(connection, Refused(reason=reason))
            self._out.append(CloseConnection(connection=connection, reason=reason))
            return
        known = self.roster.get(hello.node)
        if known is not None and known.incarnation != hello.incarnation:
            self._lose(known, "it came back as a new incarnation")
        node, replaced, new = self.roster.admit(connection, hello, self._now)
        if replaced is not None:
            self._out.append(CloseConnection(connection=replaced, reason="the agent opened a newer stream"))
        if new:
            story = f"node {node.node} is here with {node.nproc} workers"
            self.journal.note(EventKind.NODE_JOINED, story, node=node.node)
        self.highest = max(self.highest, hello.state.view)
        current = self.view.number if self.view else ViewNumber(0)
        self._send(connection, Welcome(message=self._greeting(node), current_view=current))
        self._tell_what_it_missed(connection, node)
        if hello.state.view == current:
            self._failed(hello.failures)

    def _greeting(self, node: Node) -> str:
        if self.change is not None:
            return f"view {self.change.view.number} is being prepared"
        if self.view is None:
            return self.waiting_for or f"waiting for nodes: at least {self.job.nodes_min} are needed"
        if not self.view.holds(node.node, node.incarnation) and len(self.view.members) >= self.job.nodes_max:
            return f"all {self.job.nodes_max} places are taken: this node waits as a spare"
        return f"view {self.view.number} runs with {len(self.view.members)} nodes"

    def _tell_what_it_missed(self, connection: int, node: Node) -> None:
        """Agents take every message twice without harm, so a new stream repeats whatever may have been lost."""
        change, view = self.change, self.view
        if change is not None and change.view.holds(node.node, node.incarnation):
            if node.prepared_view != change.view.number:
                self._send_prepare(node, change.view)
        elif view is not None and view.holds(node.node, node.incarnation) and node.state.phase is AgentPhase.PREPARED:
            self._send(connection, assignment.installs(view)[node.node])

    def _spoke(self, node: Node, event: AgentSpoke) -> None:
        node.heard_at = event.now
        current = self.view.number if self.view else ViewNumber(0)
        match event.message:
            case Heartbeat(state=state):
                node.take(state)
                node.stuck = node.stuck and state.phase is AgentPhase.PREPARING
            case Prepared(view=view, master_port=port):
                node.stuck = False
                if current < view <= self.highest and view >= node.prepared_view:
                    node.prepared_view, node.master_port = view, port
                    node.take(AgentState(view=view, phase=AgentPhase.PREPARED))
            case WorkersFailed(view=view, failures=failures):
                if view == current:
                    self._failed(failures)
            case WorkersFinished(view=view):
                if view == current:
                    node.finished_view = view
            case Leaving(reason=reason):
                node.said_goodbye = reason or "no reason given"
            case Hello():
                self._out.append(CloseConnection(connection=event.connection, reason="a second hello on one stream"))
            case _:
                assert_never(event.message)

    def _failed(self, failures: tuple[Failure, ...]) -> None:
        for failure in failures:
            if not self.failures:
                self.journal.note(EventKind.WORKER_FAILED, blame.describe(failure), node=failure.node)
            self.failures.add(failure, self._now)

    # Who is alive

    def _judge(self) -> None:
        members = self.view.members if self.view is not None and self.failures else ()
        for turn in self.roster.judge(self._now, members=members, failed=self.failures.nodes):
            node, name = turn.node, turn.node.node
            if node.condition is Condition.DEAD:
                self._lose(node, turn.reason)
            elif node.condition is Condition.SUSPECT:
                self.journal.note(EventKind.NODE_SUSPECTED, f"node {name} is suspect: {turn.reason}", node=name)
            elif turn.before is Condition.SUSPECT and not node.adopted:
                self.journal.note(EventKind.NODE_RETURNED, f"node {name} is back: {turn.reason}", node=name)

    def _lose(self, node: Node, why: str) -> None:
        self.journal.note(EventKind.NODE_LOST, f"node {node.node} is lost: {why}", node=node.node)
        self.roster.remove(node)
        if node.connection is not None and not node.said_goodbye:
            self._out.append(CloseConnection(connection=node.connection, reason=f"this node is lost: {why}"))

    # What comes next

    def _decide(self) -> None:
        if self.change is not None:
            self._drive(self.change)
            return
        view = self.view
        if view is None:
            self._form("the job starts")
            return
        lost = standing.lost(self.roster, view)
        if lost and standing.any_may_return(self.roster, view, self._now):
            return
        if not lost:
            self._short_since, self.waiting_for = None, ""
        if lost:
            self._form(f"{_names(lost)} lost, {len(view.members) - len(lost)} of {len(view.members)} nodes remain")
        elif self._all_finished(view):
            self._succeed(view)
        elif self.failures:
            self._answer_failures(view)
        else:
            self._consider_joiners(view)

    def _finished(self, member: Member, view: View) -> bool:
        return standing.finished(self.roster, member, view)

    def _all_finished(self, view: View) -> bool:
        return all(self._finished(member, view) for member in view.members)

    def _answer_failures(self, view: View) -> None:
        if self.failures.heard_since is None or self._now < self.failures.heard_since + FAILURE_SETTLE_S:
            return
        if standing.any_suspect(self.roster, view):
            return  # either it comes back within its grace, or it is lost and these failures are its consequence
        decision = blame.may_restart(
            restarts_used=self.restarts_used,
            max_restarts=self.job.max_restarts,
            culprit=self.failures.first,
        )
        if decision.value:
            self._form(decision.reason, charge=1)
        else:
            self._end(JobState.FAILED, decision.reason)

    def _consider_joiners(self, view: View) -> None:
        joiners = standing.joiners(self.roster, view, self.job.nodes_max)
        hindered = standing.any_suspect(self.roster, view) or any(self._finished(m, view) for m in view.members)
        if not joiners or hindered:
            self._joiner_since = None
            return
        if self._joiner_since is None:
            self._joiner_since = self._now
        if self._now - self._joiner_since >= JOIN_SETTLE_S:
            self._form(f"{_names(joiners)} joined", stop_at_step=standing.boundary(self.roster, view))

    # View changes

    def _form(self, why: str, *, charge: int = 0, stop_at_step: int | None = None) -> None:
        """Propose a view of the nodes at hand; when they are too few, let survivors stop and wait."""
        old = self.change.view if self.change else self.view
        place = {member.node: i for i, member in enumerate(old.members)} if old else {}
        candidates = [
            quorum.Candidate(node=n.node, node_rank=n.node_rank, arrival=n.arrival, member_position=place.get(n.node))
            for n in self.roster
            if n.available
        ]
        survivors = tuple(c for c in candidates if c.member_position is not None)
        if len(candidates) < self.job.nodes_min:
            self._enough_since = None
        elif self._enough_since is None:
            self._enough_since = self._now
        decision = quorum.may_form(
            present=len(candidates),
            nodes_min=self.job.nodes_min,
            nodes_max=self.job.nodes_max,
            enough_for_s=None if self._enough_since is None else self._now - self._enough_since,
            last_call_s=self.job.last_call_s,
            ran_before=bool(survivors),
        )
        self.waiting_for = "" if decision.value else decision.reason
        if decision.value:
            chosen = quorum.choose(candidates, self.job.nodes_max)
        elif survivors:
            chosen = quorum.choose(survivors, self.job.nodes_max)
        else:  # nobody is left who could prepare: the next nodes form anew
            if puts := self._abandoned():
                self._out.append(Persist(puts=puts))
            if self.view is not None:
                self._hold(len(candidates))
            return
        self._propose(chosen, f"{why}; {decision.reason}", self.restarts_used + charge, stop_at_step)

    def _abandoned(self) -> tuple[Put, ...]:
        """Give the change up, if there is one; it has to be written together with what takes its place."""
        if self.change is None:
            return ()
        abandoned, self.change = advance(self.change.view, ViewStatus.ABANDONED), None
        return (Put(key=view_key(abandoned.number), record=abandoned),)

    def _propose(self, chosen: tuple[NodeId, ...], reason: str, restarts: int, stop_at_step: int | None) -> None:
        self.highest = ViewNumber(self.highest + 1)
        nodes = [node for node in map(self.roster.get, chosen) if node is not None]
        view = View(
            number=self.highest,
            status=ViewStatus.PROPOSED,
            members=tuple(node.as_member() for node in nodes),
            restart_count=restarts,
            reason=reason,
            proposed_at=self.journal.wall,
            stop_at_step=stop_at_step,
        )
        self.journal.note(EventKind.VIEW_PROPOSED, f"view {view.number} proposed: {reason}", view=view.number)
        self._out.append(Persist(puts=(*self._abandoned(), Put(key=view_key(view.number), record=view, create=True))))
        self.failures.clear()  # this view answers them
        self.change, self.restarts_used = Change(view=view, begun_at=self._now), restarts
        self._joiner_since = None
        for node in nodes:
            self._send_prepare(node, view)

    def _drive(self, change: Change) -> None:
        view = change.view
        if self.view is not None and self._all_finished(self.view):
            self._succeed(self.view)  # they came to their end before they came to their safe point
            return
        holders = [self.roster.holder(member) for member in view.members]
        gone = [m.node for m, node in zip(view.members, holders, strict=True) if node is None or node.stuck]
        waits = standing.any_may_return(self.roster, view, self._now)
        if gone and not waits:
            self._form(f"{_names(gone)} lost while view {view.number} was prepared")
        if gone:
            return
        members = [node for node in holders if node is not None]
        unready = [node for node in members if node.prepared_view != view.number]
        if unready and self._now - change.begun_at >= PREPARE_TIMEOUT_S:
            for node in unready:
                self._leave_out(node)
        elif not waits and (joiners := self._takes(view, members)):
            self._form(
                f"{_names(joiners)} joined while view {view.number} was prepared", stop_at_step=view.stop_at_step
            )
        elif not unready and len(members) >= self.job.nodes_min:
            self._install(change, members)
        elif not unready:
            self._hold(len(members))

    def _takes(self, view: View, members: list[Node]) -> list[NodeId]:
        """Return who can join the change: nobody while no member can be told anything, or all are still too few."""
        joiners = standing.joiners(self.roster, view, self.job.nodes_max)
        present = sum(node.available for node in members)
        return joiners if present and present + len(joiners) >= self.job.nodes_min else []

    def _leave_out(self, node: Node) -> None:
        node.stuck = True
        story = f"node {node.node} did not reach its safe point within {PREPARE_TIMEOUT_S:g} s and is left out"
        self.journal.note(EventKind.NODE_SUSPECTED, story, node=node.node)

    def _hold(self, present: int) -> None:
        if self._short_since is None:
            self._short_since = self._now
        waited_s = self._now - self._short_since
        self.waiting_for = f"on hold: {present} of at least {self.job.nodes_min} nodes are here"
        if waited_s >= self.job.join_timeout_s:
            self._end(JobState.FAILED, f"{self.waiting_for}, for {waited_s:.0f} s")

    def _install(self, change: Change, members: list[Node]) -> None:
        prepared = dataclasses.replace(
            advance(change.view, ViewStatus.PREPARED),
            master_addr=members[0].address,
            master_port=members[0].master_port,
        )
        view = advance(prepared, ViewStatus.INSTALLED)
        key = view_key(view.number)
        current = Put(key=CURRENT_KEY, record=CurrentView(number=view.number))
        self._out.append(Persist(puts=(Put(key=key, record=prepared),)))
        self._out.append(Persist(puts=(Put(key=key, record=view), current)))
        story = f"view {view.number} installed {self._now - change.begun_at:.2f} s after its proposal"
        size = f"{len(view.members)} nodes, {view.world_size} workers"
        self.journal.note(EventKind.VIEW_INSTALLED, f"{story}: {size}", view=view.number)
        self.view, self.change = view, None
        self.failures.clear()
        self._short_since, self._enough_since, self.waiting_for = None, None, ""
        messages = assignment.installs(view)
        for node in members:
            if node.connection is not None:  # else its next hello says that it still waits
                self._send(node.connection, messages[node.node])

    def _succeed(self, view: View) -> None:
        self._end(JobState.SUCCEEDED, f"all {view.world_size} workers of view {view.number} finished")

    def _end(self, state: JobState, message: str) -> None:
        self.result = JobResult(state=state, message=message, at=self.journal.wall)
        self.journal.note(EventKind.JOB_ENDED, f"job {state}: {message}")
        self._out.append(Persist(puts=(*self._abandoned(), Put(key=RESULT_KEY, record=self.result, create=True))))
        for connection in self.roster.connections:
            self._send_result(connection, self.result)
        self._out.append(EndJob(result=self.result))

    # Messages

    def _send(self, connection: int, message: Welcome | Refused | Prepare | Install | JobEnded) -> None:
        self._out.append(Send(connection=connection, message=message))

    def _send_prepare(self, node: Node, view: View) -> None:
        if node.connection is not None:
            self._send(node.connection, Prepare(view=view.number, reason=view.reason, stop_at_step=view.stop_at_step))

    def _send_result(self, connection: int, result: JobResult) -> None:
        self._send(connection, JobEnded(succeeded=result.state is JobState.SUCCEEDED, message=result.message))

    def validate(self) -> None:
        """Assert every invariant; tests and the simulation call it after each event."""
        self.roster.validate()
        view, change = self.view, self.change
        if view is not None and not self.job.nodes_min <= len(view.members) <= self.job.nodes_max:
            raise InvariantViolated(f"view {view.number} is installed with {len(view.members)} nodes")
        if view is not None and view.number > self.highest:
            raise InvariantViolated(f"view {view.number} is above the highest proposed, {self.highest}")
        if change is not None and (change.view.number > self.highest or (view and change.view.number <= view.number)):
            raise InvariantViolated(f"change to view {change.view.number} is out of order")
        if self.restarts_used > self.job.max_restarts:
            raise InvariantViolated(f"{self.restarts_used} restarts used of {self.job.max_restarts}")


def _names(nodes: list[NodeId]) -> str:
    shown = ", ".join(nodes[:8]) + (" and others" if len(nodes) > 8 else "")
    return f"node {shown}" if len(nodes) == 1 else f"nodes {shown}"
