"""One controller candidate in virtual time: the real ControllerCore, run as controller/driver.py and server.py do.

Invariants: those of controller/driver.py; every step below names no decision of its own.
1. Actions are executed strictly in order; a Persist that is not durable holds back what follows.
2. A lost fence, lease or answer ends the term: what was not executed is dropped, streams are closed.
"""

from collections import deque
from collections.abc import Callable

from elastic_run.controller.actions import Action, CloseConnection, EndJob, Persist, Send
from elastic_run.controller.core import ControllerCore
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
from elastic_run.controller.server import HELLO_DEADLINE_S
from elastic_run.runtime.edge.election import RECHECK_S
from elastic_run.runtime.edge.store import Delete, EventKind, LeaseId, Put, Snapshot, TxnResult, WatchBatch, Write
from elastic_run.runtime.protocol import codec
from elastic_run.runtime.protocol.config import JobConfig
from elastic_run.runtime.protocol.errors import FenceLost, StoreError, StoreUncertain
from elastic_run.runtime.protocol.ids import FencingToken, Incarnation, NodeId
from elastic_run.runtime.protocol.messages import AgentMessage, Hello, Refused
from elastic_run.runtime.protocol.records import (
    LEADER_KEY,
    NODES_PREFIX,
    RESULT_KEY,
    JobSpec,
    LeaderRecord,
    NodeRecord,
    decode_job,
)
from simulation.checkers import Checkers, Violation
from simulation.clock import Process, Simulation
from simulation.etcd import Etcd, EtcdClient, Watch
from simulation.lease import Keeper
from simulation.network import Network, Stream

UNCERTAIN_TRIES_MAX = 3  # runtime/edge/election.py
LEASE_TTL_S = 2


class Candidate(Process):
    """`ended` is told when run() of the driver would return."""

    #: mutations set these
    fenced = True
    waits_for_persist = True
    drops_lease_gone = False

    def __init__(
        self,
        sim: Simulation,
        name: str,
        host: str,
        *,
        job: JobConfig,
        etcd: Etcd,
        network: Network,
        checkers: Checkers,
        core_of: Callable[[TermBegan], ControllerCore],
    ) -> None:
        super().__init__(sim, name, host)
        self.job, self.etcd, self.network, self.checkers = job, etcd, network, checkers
        self.core_of = core_of
        self.client = EtcdClient(etcd, self)
        self.term: Term | None = None
        self.returned = False
        self.server: dict[int, Stream] = {}
        self._numbers = 0
        self._keeper: Keeper | None = None
        self._watches: list[Watch] = []
        self._round = 0
        #: called before each action is executed, with its position in the term
        self.on_action: Callable[[Candidate, int, Action], None] = lambda _c, _i, _a: None
        self.run(self._new_term)

    @property
    def leading(self) -> bool:
        return self.alive and self.term is not None

    def stall(self) -> None:
        super().stall()
        self.network.stalled(self)

    def resume(self) -> None:
        self.network.resumed(self)
        super().resume()

    def kill(self, *, silently: bool = False) -> None:
        """kill -9; silently: its host lost power, nobody is told."""
        self.tell("is killed" + (" with its host" if silently else ""))
        self._gone(silently=silently)

    def _gone(self, *, silently: bool) -> None:
        self.end()
        self.term = None
        self.client.close()
        self.network.gone(self, silently=silently)
        self.server.clear()

    # Terms

    def _new_term(self) -> None:
        granted_at = self.clock()
        self.client.call(lambda: self.etcd.grant(LEASE_TTL_S), lambda lease: self._granted(lease, granted_at))

    def _granted(self, lease: LeaseId | StoreError, granted_at: float) -> None:
        if isinstance(lease, StoreError):
            self.after(STORE_RETRY_S, self._new_term)
            return
        self._round += 1
        number = self._round
        self._keeper = Keeper(self.client, lease, LEASE_TTL_S, granted_at, self.lose_leadership)
        self._watches = [
            self.client.follow(RESULT_KEY, lambda found: self._result_seen(found, number), lambda e: self.lose_leadership(str(e)))
        ]
        self._campaign(number, lease, 0)

    def _result_seen(self, found: Snapshot | WatchBatch, number: int) -> None:
        """Who ended the job may be gone before all agents were told: wait to lead after it, then go."""
        if number == self._round and self.term is None and (found.items if isinstance(found, Snapshot) else found.events):
            self.tell("sees the job's result")
            self.after(2 * FAREWELL_S, lambda: self._return_unless_leading(number))

    def _return_unless_leading(self, number: int) -> None:
        if number == self._round and self.term is None:
            self._return()

    def _campaign(self, number: int, lease: LeaseId, uncertain: int) -> None:
        if number != self._round:
            return
        record = codec.encode(LeaderRecord(candidate=self.name, address=self.name))
        self.client.txn(
            ((LEADER_KEY, 0),),
            (Put(key=LEADER_KEY, value=record, lease_id=lease),),
            lambda answer: self._campaigned(answer, number, lease, uncertain),
            reads=(LEADER_KEY,),
        )

    def _campaigned(self, answer: TxnResult | StoreError, number: int, lease: LeaseId, uncertain: int) -> None:
        if number != self._round:
            return
        if isinstance(answer, StoreUncertain) and uncertain + 1 < UNCERTAIN_TRIES_MAX:
            self._campaign(number, lease, uncertain + 1)
        elif isinstance(answer, StoreError):
            self.lose_leadership(str(answer))
        elif answer.succeeded:
            self._lead(number, answer.revision)
        elif (holder := answer.current[0]) is not None and holder.lease_id == lease:
            self._lead(number, holder.create_revision)
        else:
            again = _Once(lambda: self._campaign(number, lease, 0))
            self._watches.append(self.client.follow(LEADER_KEY, _when_deleted(again), lambda e: self.lose_leadership(str(e))))
            self.after(RECHECK_S, again)

    def _lead(self, number: int, token: int) -> None:
        self._close_watches()

        def began(found: Snapshot | WatchBatch) -> None:
            if number != self._round:
                return
            if self.term is None and isinstance(found, Snapshot):
                self.term = Term(self, token, found)
                self.term.begin()
            elif self.term is not None:
                self.term.nodes_changed(found)

        self._watches = [self.client.follow("", began, lambda e: self.lose_leadership(str(e)))]
        self._watches.append(
            self.client.follow(LEADER_KEY, _when_replaced(token, lambda: self.lose_leadership("the key is gone")), lambda e: self.lose_leadership(str(e)))
        )

    def lose_leadership(self, reason: str) -> None:
        """The term, or the candidacy, ended without the job's end."""
        self.tell(f"term over: {reason}")
        self._stop_term()
        self._give_back(lambda: self.after(STORE_RETRY_S, self._new_term))

    def _stop_term(self) -> None:
        self._round += 1
        if self.term is not None:
            self.term.over = True
            self.term = None
        self._close_watches()
        for number in tuple(self.server):
            self.close_stream(number)

    def _give_back(self, then: Callable[[], None]) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            then()
            return
        keeper.stop()
        self.client.call(lambda: self.etcd.revoke(keeper.lease_id), lambda _: then(), deadline_s=1.0)

    def resign(self) -> None:
        """The job is over and its agents know: run() returns."""
        self._return()

    def _return(self) -> None:
        self._stop_term()
        self.returned = True
        self._give_back(lambda: self._gone(silently=False))

    def _close_watches(self) -> None:
        for watch in self._watches:
            watch.close()
        self._watches = []

    # The server

    def accept(self, stream: Stream) -> None:
        end = stream.ends[1]
        if self.term is None:
            stream.close(1, "this controller does not lead")
            return
        greeted: list[int] = []

        def deadline() -> None:
            if not greeted and end.open:
                self.tell("turns a silent stream away")
                stream.close(1, f"no hello within {HELLO_DEADLINE_S:g} s")

        def take(message: AgentMessage) -> None:
            if greeted:
                self._post(greeted[0], message)
            elif self.term is None:
                stream.close(1, "this controller does not lead")
            elif isinstance(message, Hello):
                greeted.append(self._hello(stream, message, self.term))

        end.on_message = take
        end.on_end = lambda reason: self._stream_ended(greeted, reason)
        self.after(HELLO_DEADLINE_S, deadline)

    def _hello(self, stream: Stream, hello: Hello, term: "Term") -> int:
        self._numbers += 1
        self.server[self._numbers] = stream
        term.take(AgentConnected(connection=self._numbers, hello=hello, **term.stamp()))
        return self._numbers

    def _post(self, connection: int, message: AgentMessage) -> None:
        if self.term is not None and connection in self.server:
            self.term.take(AgentSpoke(connection=connection, message=message, **self.term.stamp()))

    def _stream_ended(self, greeted: list[int], reason: str) -> None:
        for connection in greeted:
            self.server.pop(connection, None)
            if self.term is not None:
                self.term.take(AgentDisconnected(connection=connection, reason=reason, **self.term.stamp()))

    def close_stream(self, connection: int) -> None:
        stream = self.server.pop(connection, None)
        if stream is None:
            return
        stream.close(1, "the controller closed it")
        if self.term is not None:
            term = self.term
            event = AgentDisconnected(connection=connection, reason="the controller closed it", **term.stamp())
            self.after(0.0, lambda: term.take(event))


class Term:
    """One leadership: the core, its queue of actions, the executor."""

    def __init__(self, candidate: Candidate, token: int, found: Snapshot) -> None:
        self.candidate, self.token = candidate, token
        self.over = False
        self._queue: deque[Action] = deque()
        self._writing = False
        self._done = 0
        self._causes = 0
        self._tick_number = 0
        self._known: dict[str, NodeRecord] = {}
        job = candidate.job
        records = decode_job(job.job_id, ((kv.key, kv.value) for kv in found.items))
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

    def stamp(self) -> dict[str, float | str]:
        self._causes += 1
        return {"now": self.candidate.clock(), "wall": self.candidate.sim.now, "cause": f"e{self._causes}"}

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
        """As the driver's _watch_nodes; the first snapshot made the core and is not passed here."""
        if isinstance(change, Snapshot):
            found = {kv.key: kv.value for kv in change.items if kv.key.startswith(NODES_PREFIX)}
            for key in [key for key in self._known if key not in found]:
                gone = self._known.pop(key)
                self._lease_gone(gone.node, gone.incarnation)
            for key, value in found.items():
                self._lease_seen(key, value)
            return
        for event in change.events:
            key = event.kv.key
            if not key.startswith(NODES_PREFIX):
                continue
            if event.kind is EventKind.PUT:
                self._lease_seen(key, event.kv.value)
            elif key in self._known:
                gone = self._known.pop(key)
                self._lease_gone(gone.node, gone.incarnation)
            else:
                name = NodeId(key.removeprefix(NODES_PREFIX))
                node = self.core.roster.get(name)
                if node is not None:
                    self._lease_gone(name, node.incarnation)

    def _lease_seen(self, key: str, value: bytes) -> None:
        self._known[key] = codec.decode(NodeRecord, value, where=key)
        self.take(NodeLeaseSeen(record=self._known[key], **self.stamp()))

    def _lease_gone(self, node: NodeId, incarnation: Incarnation) -> None:
        if not self.candidate.drops_lease_gone:
            self.take(NodeLeaseGone(node=node, incarnation=incarnation, **self.stamp()))

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


class _Once:
    """Calls a callback the first time only."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback: Callable[[], None] | None = callback

    def __call__(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()


def _when_deleted(callback: Callable[[], None]) -> Callable[[Snapshot | WatchBatch], None]:
    def look(found: Snapshot | WatchBatch) -> None:
        if isinstance(found, Snapshot):
            gone = not found.items
        else:
            gone = any(event.kind is EventKind.DELETE for event in found.events)
        if gone:
            callback()

    return look


def _when_replaced(token: int, callback: Callable[[], None]) -> Callable[[Snapshot | WatchBatch], None]:
    def look(found: Snapshot | WatchBatch) -> None:
        if isinstance(found, Snapshot):
            gone = all(kv.create_revision != token for kv in found.items)
        else:
            gone = any(event.kind is EventKind.DELETE for event in found.events)
        if gone:
            callback()

    return look


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


__all__ = ["Candidate", "Refused", "Term"]
