"""One term of a leader in virtual time: the core, its queue of actions, the executor of controller/driver.py.

Invariants: actions are executed strictly in order; a Persist that is not durable holds back what follows.
Not here: how leadership is won and lost, the server (candidate.py).
"""

from collections import deque
from typing import TYPE_CHECKING, TypedDict

from simulation.checkers import Violation

from elastic_run.controller.actions import Action, CloseConnection, EndJob, Persist, Send
from elastic_run.controller.driver import FAREWELL_S, STORE_RETRY_S, TICK_BUSY_S, TICK_IDLE_S
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
from elastic_run.controller.node_leases import NodeLeases
from elastic_run.runtime.edge.store import Delete, Put, Snapshot, TxnResult, WatchBatch, Write
from elastic_run.runtime.protocol import codec
from elastic_run.runtime.protocol.errors import FenceLost, StoreError, StoreUncertain
from elastic_run.runtime.protocol.ids import FencingToken
from elastic_run.runtime.protocol.records import (
    LEADER_KEY,
    JobSpec,
    NodeRecord,
    decode_job,
)

if TYPE_CHECKING:
    from simulation.candidate import Candidate


class Stamp(TypedDict):
    """What every event carries."""

    now: float
    wall: float
    cause: str


class Term:
    """One leadership: the core, its queue of actions, the executor."""

    def __init__(self, candidate: "Candidate", token: int, found: Snapshot) -> None:
        self.candidate, self.token = candidate, token
        self.over = False
        self._queue: deque[Action] = deque()
        self._writing = False
        self._done = 0
        self._causes = 0
        self._tick_number = 0
        job = candidate.job
        records = decode_job(job.job_id, ((kv.key, kv.value) for kv in found.items))
        self._leases = NodeLeases(records.nodes, on_seen=self._lease_seen, on_gone=self._lease_gone)
        self.core = candidate.core_of(
            TermBegan(
                now=candidate.clock(),
                token=FencingToken(token),
                candidate=candidate.name,
                records=records,
                fresh_spec=JobSpec(job=job, token=f"join-{candidate.name}-{token}"),
            )
        )

    def begin(self) -> None:
        candidate = self.candidate
        candidate.checkers.led(candidate.name, self.token)
        candidate.tell(f"leads with token {self.token}")
        self._enqueue(self.core.begin(candidate.sim.now))
        if self.core.result is not None:
            self._farewell(late=True)
        self._arm()

    def stamp(self) -> Stamp:
        self._causes += 1
        return Stamp(now=self.candidate.clock(), wall=self.candidate.sim.now, cause=f"e{self._causes}")

    def take(self, event: ControllerEvent) -> None:
        if self.over:
            return
        actions = self.core.handle(event)
        self.core.validate()
        if not isinstance(event, Ticked) or actions:
            self.candidate.tell(f"{_brief(event)} -> {len(actions)}")
        self._enqueue(actions)
        self._arm()

    def nodes_changed(self, change: Snapshot | WatchBatch) -> None:
        """As the driver does; the first snapshot made the core and is not passed here."""
        self._leases.take(change)

    def _lease_seen(self, record: NodeRecord) -> None:
        self.take(NodeLeaseSeen(record=record, **self.stamp()))

    def _lease_gone(self, record: NodeRecord) -> None:
        if not self.candidate.drops_lease_gone:
            self.take(NodeLeaseGone(node=record.node, incarnation=record.incarnation, **self.stamp()))

    def _arm(self) -> None:
        """A tick comes when no event has come for a while."""
        self._tick_number += 1
        number = self._tick_number
        self.candidate.after(TICK_IDLE_S if self.core.settled else TICK_BUSY_S, lambda: self._tick(number))

    def _tick(self, number: int) -> None:
        if not self.over and number == self._tick_number:
            self.take(Ticked(**self.stamp()))

    # Actions

    def _enqueue(self, actions: list[Action]) -> None:
        self._queue.extend(actions)
        self._execute()

    def _execute(self) -> None:
        while self._queue and not self._writing and not self.over:
            action = self._queue.popleft()
            self._done += 1
            self.candidate.on_action(self.candidate, self._done, action)
            if self.over or not self.candidate.alive:
                return
            match action:
                case Persist():
                    self._writing = self.candidate.waits_for_persist
                    self._persist(action)
                case Send(connection=connection, message=message):
                    stream = self.candidate.server.get(connection)
                    if stream is not None:
                        self.candidate.tell(f"send {connection} {_said(message)}")
                        stream.send(1, message)
                case CloseConnection(connection=connection):
                    self.candidate.close_stream(connection)
                case EndJob(result=result):
                    self.candidate.tell(f"job {result.state}: {result.message}")
                    self._farewell(late=False)

    def _persist(self, action: Persist) -> None:
        candidate = self.candidate
        compares = [(put.key, 0) for put in action.puts if put.create]
        if candidate.fenced:
            compares.insert(0, (LEADER_KEY, self.token))
        writes: list[Write] = [Put(key=put.key, value=codec.encode(put.record)) for put in action.puts]
        writes += [Delete(key=key) for key in action.deletes]
        candidate.client.txn(
            compares,
            writes,
            lambda answer: self._persisted(action, answer),
            reads=(LEADER_KEY,),
            applied=lambda: candidate.checkers.wrote(self.token, action),
        )

    def _persisted(self, action: Persist, answer: TxnResult | StoreError) -> None:
        if self.over:
            return
        candidate = self.candidate
        if isinstance(answer, StoreUncertain | FenceLost):
            candidate.lose_leadership(str(answer))
        elif isinstance(answer, StoreError):
            candidate.after(STORE_RETRY_S, lambda: None if self.over else self._persist(action))
        elif not answer.succeeded:
            holder = answer.current[0]
            if holder is None or holder.create_revision != self.token:
                candidate.lose_leadership("another leads")
                return
            keys = [put.key for put in action.puts if put.create]
            raise Violation(f"{candidate.name}: one of {keys} was there already: StoreCorrupt ends this controller")
        else:
            candidate.tell("durable " + ", ".join(put.key for put in action.puts))
            self._writing = False
            self._execute()

    def _farewell(self, *, late: bool) -> None:
        """Late: the job ended under another leader, and agents that missed it have yet to come."""
        deadline = self.candidate.clock() + FAREWELL_S

        def look() -> None:
            if self.over:
                return
            if not (late or self.candidate.server) or self.candidate.clock() >= deadline:
                self.candidate.resign()
            else:
                self.candidate.after(TICK_BUSY_S, look)

        look()


def _brief(event: ControllerEvent) -> str:
    match event:
        case AgentConnected(connection=connection, hello=hello):
            return f"hello {connection} {hello.node} {hello.incarnation} {hello.state.phase} {hello.state.view}"
        case AgentSpoke(connection=connection, message=message):
            return f"heard {connection} {_said(message)}"
        case AgentDisconnected(connection=connection, reason=reason):
            return f"lost {connection}: {reason}"
        case NodeLeaseSeen(record=record):
            return f"lease seen {record.node} {record.incarnation}"
        case NodeLeaseGone(node=node, incarnation=incarnation):
            return f"lease gone {node} {incarnation}"
        case _:
            return "tick"


def _said(message: object) -> str:
    view = getattr(message, "view", "")
    state = getattr(message, "state", None)
    return f"{type(message).__name__} {view}" + (f"{state.phase} {state.view}" if state is not None else "")
