"""Terse constructors of what the cores eat, and harnesses that feed them under a running clock.

A harness plays the driver: it executes actions in order, asserts that nothing is sent before it is durable, and calls
validate() after every event.
"""

import dataclasses
import itertools
from typing import TypeVar

from elastic_run.agent import actions as agent_actions
from elastic_run.agent import events as agent_events
from elastic_run.agent.core import AgentCore
from elastic_run.controller.actions import Action, CloseConnection, EndJob, Persist, Send
from elastic_run.controller.core import ControllerCore
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
from elastic_run.runtime.protocol import codec
from elastic_run.runtime.protocol.config import (
    AgentConfig,
    CommandConfig,
    Entrypoint,
    JobConfig,
    OutputConfig,
    StoreConfig,
)
from elastic_run.runtime.protocol.ids import PROTOCOL_VERSION, FencingToken, Incarnation, JobId, NodeId, ViewNumber
from elastic_run.runtime.protocol.messages import (
    AgentMessage,
    AgentPhase,
    AgentState,
    ControllerMessage,
    Failure,
    Heartbeat,
    Hello,
    Install,
    JobEnded,
    Prepare,
    Prepared,
    WorkersFailed,
    WorkersFinished,
)
from elastic_run.runtime.protocol.records import (
    CURRENT_KEY,
    RESULT_KEY,
    CurrentView,
    EventKind,
    EventRecord,
    JobSpec,
    JobState,
    NodeRecord,
    decode_job,
    view_key,
)
from elastic_run.runtime.protocol.view import Member, View, ViewStatus

M = TypeVar("M")

JOB_ID = JobId("j")
TOKEN = "join-token"


def job_config(
    nodes: str = "1:4", max_restarts: int = 3, last_call_s: float = 30.0, join_s: float = 600.0
) -> JobConfig:
    """A job of `MIN:MAX` nodes."""
    low, _, high = nodes.partition(":")
    return JobConfig(
        job_id=JOB_ID,
        nodes_min=int(low),
        nodes_max=int(high or low),
        max_restarts=max_restarts,
        last_call_s=last_call_s,
        join_timeout_s=join_s,
    )


def job_spec(job: JobConfig | None = None) -> JobSpec:
    return JobSpec(job=job or job_config(), token=TOKEN)


def agent_config(node: str = "a", nproc: int = 2, job: JobConfig | None = None) -> AgentConfig:
    return AgentConfig(
        job=job or job_config(),
        store=StoreConfig(endpoints=("127.0.0.1:1",)),
        node=NodeId(node),
        node_rank=None,
        address=f"{node}.host",
        nproc=nproc,
        role="default",
        command=CommandConfig(entrypoint=Entrypoint.SCRIPT, target="t.py", args=(), python="python"),
        output=OutputConfig(
            log_dir=None, redirects="0", tee="0", local_ranks_filter=None, stdout_filters=(), stderr_filters=()
        ),
        run_dir="/run",
    )


def state(phase: str = "idle", view: int = 0, step: int = 0, rate_hz: float = 0.0) -> AgentState:
    return AgentState(view=ViewNumber(view), phase=AgentPhase(phase), step_max=step, step_rate_hz=rate_hz)


def hello(node: str = "a", life: str = "1", job: JobConfig | None = None, **changes: object) -> Hello:
    """A hello as a fresh agent says it; `changes` are fields."""
    job = job or job_config()
    fresh = Hello(
        protocol_version=PROTOCOL_VERSION,
        job_id=job.job_id,
        token=TOKEN,
        node=NodeId(node),
        incarnation=Incarnation(f"{node}{life}"),
        address=f"{node}.host",
        nproc=2,
        node_rank=None,
        nodes_min=job.nodes_min,
        nodes_max=job.nodes_max,
        max_restarts=job.max_restarts,
        state=state(),
        master_port=None,
        failures=(),
    )
    return dataclasses.replace(fresh, **changes)  # type: ignore[arg-type]


def failure(rank: int = 0, node: str = "a", age_s: float = 0.0, **changes: object) -> Failure:
    plain = Failure(
        node=NodeId(node),
        rank=rank,
        local_rank=0,
        pid=1000 + rank,
        exit_code=1,
        signal=None,
        message="",
        traceback="",
        age_s=age_s,
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def member(node: str = "a", life: str = "1", nproc: int = 2) -> Member:
    return Member(node=NodeId(node), incarnation=Incarnation(f"{node}{life}"), address=f"{node}.host", nproc=nproc)


def view(number: int = 1, nodes: str = "ab", status: ViewStatus = ViewStatus.INSTALLED, **changes: object) -> View:
    """A view of one-letter nodes in their first life."""
    plain = View(
        number=ViewNumber(number),
        status=status,
        members=tuple(member(node) for node in nodes),
        restart_count=0,
        reason="r",
        proposed_at=0.0,
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


class LeaderDied(Exception):
    """The harness ran out of the actions it was allowed."""


class ControllerHarness:
    """A leader, its store and its agents' mailboxes. Nodes are single letters; each has at most one open stream."""

    def __init__(
        self, nodes: str = "1:4", max_restarts: int = 3, last_call_s: float = 30.0, join_s: float = 600.0
    ) -> None:
        self.job = job_config(nodes, max_restarts, last_call_s, join_s)
        self.now = 100.0
        self.stored: dict[str, bytes] = {}
        self.connections: dict[str, int] = {}
        self.lives: dict[str, str] = {}
        #: every message sent to a node, oldest first
        self.mail: dict[str, list[ControllerMessage]] = {}
        self.closed: list[tuple[int, str]] = []
        self.actions: list[Action] = []
        self.ended = False
        #: how many more actions the leader lives to see executed; None: no end
        self.actions_left: int | None = None
        self._numbers = itertools.count(1)
        self._owners: dict[int, str] = {}
        self._terms = itertools.count(1)
        self._lead()

    # Time and leadership

    def take_over(self) -> None:
        """Another leader begins with what is durable; every stream is gone."""
        self.connections.clear()
        self._lead()

    def tick(self, seconds: float = 0.0, step_s: float = 0.1) -> None:
        """Let time pass in small steps."""
        for _ in range(max(1, round(seconds / step_s))):
            self.now += min(seconds, step_s)
            self.feed(Ticked(now=self.now, wall=self.now, cause="t"))

    def feed(self, event: ControllerEvent) -> None:
        actions = self.core.handle(event)
        self.core.validate()
        self._execute(actions)

    def _lead(self) -> None:
        self.actions_left = None
        records = decode_job(JOB_ID, self.stored.items())
        began = TermBegan(
            now=self.now,
            token=FencingToken(next(self._terms)),
            candidate="c",
            records=records,
            fresh_spec=job_spec(self.job),
        )
        self.core = ControllerCore(began)
        self.core.validate()
        self._execute(self.core.begin(self.now))

    # Nodes

    def join(self, node: str, life: str = "1", lease: bool = True, **changes: object) -> None:
        """The node opens a stream."""
        number = next(self._numbers)
        self._owners[number] = node
        self.lives[node] = life
        self.connections[node] = number
        said = hello(node, life, self.job, **changes)
        self.feed(AgentConnected(now=self.now, wall=self.now, cause="t", connection=number, hello=said))
        if lease:
            self.lease(node, life)

    def say(self, node: str, message: AgentMessage) -> None:
        number = self.connections[node]
        self.feed(AgentSpoke(now=self.now, wall=self.now, cause="t", connection=number, message=message))

    def beat(self, node: str, phase: str, view: int, step: int = 0, rate_hz: float = 0.0) -> None:
        self.say(node, Heartbeat(state=state(phase, view, step, rate_hz)))

    def cut(self, node: str) -> None:
        """The node's stream breaks."""
        number = self.connections.pop(node)
        self.feed(AgentDisconnected(now=self.now, wall=self.now, cause="t", connection=number, reason="broken"))

    def lease(self, node: str, life: str = "1") -> None:
        it = member(node, life)
        record = NodeRecord(node=it.node, incarnation=it.incarnation, address=it.address, nproc=it.nproc)
        self.feed(NodeLeaseSeen(now=self.now, wall=self.now, cause="t", record=record))

    def unlease(self, node: str, life: str = "1") -> None:
        it = member(node, life)
        self.feed(NodeLeaseGone(now=self.now, wall=self.now, cause="t", node=it.node, incarnation=it.incarnation))

    def kill(self, node: str) -> None:
        """Stream and lease go, as when a machine is lost."""
        self.cut(node)
        self.unlease(node, self.lives[node])

    def acknowledge(self, nodes: str) -> None:
        """The nodes answer the newest Prepare they got."""
        for node in nodes:
            newest = self.last(node, Prepare)
            self.say(node, Prepared(view=newest.view, master_port=4000))

    def alive(self, nodes: str) -> None:
        """The nodes repeat their newest known state, so that nobody takes them for silent."""
        for node in nodes:
            known = self.core.roster.get(NodeId(node))
            assert known is not None
            self.say(node, Heartbeat(state=known.state))

    def wait(self, seconds: float, talking: str) -> None:
        """Let time pass while these nodes go on talking."""
        for _ in range(max(1, round(seconds / 0.5))):
            self.tick(min(seconds, 0.5))
            self.alive(talking)

    def run(self, nodes: str) -> None:
        """Bring the nodes into one running view."""
        for node in nodes:
            if node not in self.connections:
                self.join(node)
        if self.core.change is None:
            self.wait(self.job.last_call_s + 0.5, talking=nodes)
        assert self.core.change is not None
        assert self.members(self.core.change.view) == nodes
        self.acknowledge(nodes)
        self.running(nodes)

    def running(self, nodes: str, step: int = 0, rate_hz: float = 0.0) -> None:
        """The nodes say that they run in the installed view."""
        assert self.core.view is not None
        for node in nodes:
            assert self.last(node, Install).view == self.core.view.number
            self.beat(node, "running", self.core.view.number, step, rate_hz)

    # What came of it

    @staticmethod
    def members(of: View | None) -> str:
        return "" if of is None else "".join(m.node for m in of.members)

    @property
    def installed(self) -> str:
        return self.members(self.core.view)

    @property
    def proposed(self) -> str:
        return self.members(self.core.change.view if self.core.change else None)

    def last(self, node: str, kind: type[M]) -> M:
        return [m for m in self.mail.get(node, []) if isinstance(m, kind)][-1]

    def count(self, node: str, kind: type[ControllerMessage]) -> int:
        return sum(isinstance(m, kind) for m in self.mail.get(node, []))

    def entries(self, kind: EventKind) -> list[EventRecord]:
        return [e for e in decode_job(JOB_ID, self.stored.items()).events if e.kind is kind]

    def record(self, number: int) -> View:
        return codec.decode(View, self.stored[view_key(ViewNumber(number))], where="view")

    # The driver's part

    def _execute(self, actions: list[Action]) -> None:
        for action in actions:
            if self.actions_left is not None:
                if self.actions_left == 0:
                    raise LeaderDied
                self.actions_left -= 1
            self.actions.append(action)
            match action:
                case Persist():
                    self._persist(action)
                case Send():
                    self._check_durable(action.message)
                    self.mail.setdefault(self._owners[action.connection], []).append(action.message)
                case CloseConnection():
                    self.closed.append((action.connection, action.reason))
                case EndJob():
                    assert RESULT_KEY in self.stored
                    self.ended = True

    def _persist(self, action: Persist) -> None:
        assert action.puts or action.deletes
        keys = [put.key for put in action.puts]
        assert len(set(keys)) == len(keys), f"a key twice in one transaction: {keys}"
        assert len(keys) + len(action.deletes) <= 120
        for put in action.puts:
            assert not (put.create and put.key in self.stored), f"{put.key} is there already"
            self.stored[put.key] = codec.encode(put.record)
        for key in action.deletes:
            self.stored.pop(key, None)

    def _check_durable(self, message: ControllerMessage) -> None:
        match message:
            case Prepare(view=number):
                assert self.record(number).status in (ViewStatus.PROPOSED, ViewStatus.PREPARED)
            case Install(view=number):
                assert self.record(number).status is ViewStatus.INSTALLED
                current = codec.decode(CurrentView, self.stored[CURRENT_KEY], where="current")
                assert current.number == number
            case JobEnded():
                assert RESULT_KEY in self.stored
            case _:
                pass


def failed(harness: ControllerHarness, node: str, rank: int = 0, age_s: float = 0.0) -> None:
    """One of the node's workers fails in the installed view."""
    number = harness.core.view.number if harness.core.view else ViewNumber(0)
    harness.say(node, WorkersFailed(view=number, failures=(failure(rank, node, age_s),)))


def finish(harness: ControllerHarness, nodes: str, number: int | None = None) -> None:
    """All workers of the nodes end with 0, in the installed view unless said otherwise."""
    assert harness.core.view is not None
    for node in nodes:
        harness.say(node, WorkersFinished(view=ViewNumber(number or harness.core.view.number)))


def state_of(harness: ControllerHarness) -> JobState | None:
    return harness.core.result.state if harness.core.result else None


class AgentHarness:
    """An agent core; `out` holds the actions of the newest event, `log` all of them."""

    def __init__(self, config: AgentConfig | None = None) -> None:
        self.now = 100.0
        self.core = AgentCore(config or agent_config(), self.now)
        self.out: list[agent_actions.Action] = []
        self.log: list[agent_actions.Action] = []

    def feed(self, event: agent_events.AgentEvent) -> "AgentHarness":
        was_busy = self.core.busy
        self.out = self.core.handle(event)
        self.core.validate()
        if any(isinstance(a, agent_actions.StartWorkers) for a in self.out):
            assert not was_busy, "workers start while others may run"
        if any(isinstance(a, agent_actions.Exit) for a in self.out):
            assert not self.core.busy, "the agent exits while workers may run"
        self.log += self.out
        return self

    def hear(self, message: ControllerMessage) -> "AgentHarness":
        return self.feed(agent_events.ControllerSpoke(now=self.now, message=message))

    def tick(self, seconds: float = 0.0, step: int = 0, rate_hz: float = 0.0) -> "AgentHarness":
        self.now += seconds
        return self.feed(agent_events.Ticked(now=self.now, step_max=step, step_rate_hz=rate_hz))

    def current(self, number: int) -> "AgentHarness":
        return self.feed(agent_events.CurrentViewSeen(now=self.now, number=ViewNumber(number)))

    def port(self, number: int = 4000) -> "AgentHarness":
        return self.feed(agent_events.PortReserved(now=self.now, port=number))

    def exited(self, local_rank: int, failed: Failure | None = None, view: int | None = None) -> "AgentHarness":
        number = self.core.current_view if view is None else ViewNumber(view)
        return self.feed(agent_events.WorkerExited(now=self.now, view=number, local_rank=local_rank, failure=failed))

    def parked(self, view: int) -> "AgentHarness":
        return self.feed(agent_events.WorkersParked(now=self.now, view=ViewNumber(view)))

    def stopped(self, starts: int | None = None) -> "AgentHarness":
        count = self.core.starts if starts is None else starts
        return self.feed(agent_events.WorkersStopped(now=self.now, starts=count))

    def signal(self, number: int) -> "AgentHarness":
        return self.feed(agent_events.SignalReceived(now=self.now, signal=number))

    def lost(self) -> "AgentHarness":
        return self.feed(agent_events.ControllerLost(now=self.now, reason="broken"))

    def run(self, view: int = 1) -> "AgentHarness":
        """From idle into a running view."""
        return self.hear(prepare(view)).port().hear(install(view))

    def told(self, kind: type[M]) -> list[M]:
        """Messages of a kind among the newest actions."""
        return [a.message for a in self.out if isinstance(a, agent_actions.Tell) and isinstance(a.message, kind)]

    def did(self, kind: type[M]) -> list[M]:
        return [a for a in self.out if isinstance(a, kind)]

    @property
    def lines(self) -> list[str]:
        return [a.line for a in self.out if isinstance(a, agent_actions.Announce)]


def prepare(view: int, stop_at_step: int | None = None) -> Prepare:
    return Prepare(view=ViewNumber(view), reason="r", stop_at_step=stop_at_step)


def install(view: int, nodes: int = 1, first_rank: int = 0, world_size: int = 2) -> Install:
    return Install(
        view=ViewNumber(view),
        reason="r",
        group_rank=0,
        group_world_size=nodes,
        first_rank=first_rank,
        world_size=world_size,
        master_addr="a.host",
        master_port=4000,
        restart_count=0,
    )
