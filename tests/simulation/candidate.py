"""One controller candidate in virtual time: the real ControllerCore, run as controller/driver.py and server.py do.

Invariants: those of controller/driver.py; every step below names no decision of its own.
1. Actions are executed strictly in order; a Persist that is not durable holds back what follows.
2. A lost fence, lease or answer ends the term: what was not executed is dropped, streams are closed.
"""

from collections.abc import Callable

from simulation.checkers import Checkers
from simulation.clock import Process, Simulation
from simulation.etcd import Etcd, EtcdClient, Watch
from simulation.lease import Keeper
from simulation.network import Network, Stream
from simulation.term import Term

from elastic_run.controller.actions import Action
from elastic_run.controller.core import ControllerCore
from elastic_run.controller.driver import FAREWELL_S, STORE_RETRY_S
from elastic_run.controller.events import (
    AgentConnected,
    AgentDisconnected,
    AgentSpoke,
    TermBegan,
)
from elastic_run.controller.server import HELLO_DEADLINE_S
from elastic_run.runtime.edge.election import RECHECK_S, UNCERTAIN_TRIES_MAX
from elastic_run.runtime.edge.store import EventKind, LeaseId, Put, Snapshot, TxnResult, WatchBatch
from elastic_run.runtime.protocol import codec
from elastic_run.runtime.protocol.config import JobConfig
from elastic_run.runtime.protocol.errors import StoreError, StoreUncertain
from elastic_run.runtime.protocol.messages import AgentMessage, Hello
from elastic_run.runtime.protocol.records import (
    LEADER_KEY,
    RESULT_KEY,
    LeaderRecord,
)

LEASE_TTL_S = 2


class Candidate(Process):
    """`returned` is set when run() of the driver has returned: the job is over."""

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
            self.client.follow(
                RESULT_KEY, lambda found: self._result_seen(found, number), lambda e: self.lose_leadership(str(e))
            )
        ]
        self._campaign(number, lease, 0)

    def _result_seen(self, found: Snapshot | WatchBatch, number: int) -> None:
        """Who ended the job may be gone before all agents were told: wait to lead after it, then go."""
        if (
            number == self._round
            and self.term is None
            and (found.items if isinstance(found, Snapshot) else found.events)
        ):
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
            self._watches.append(
                self.client.follow(LEADER_KEY, _when_deleted(again), lambda e: self.lose_leadership(str(e)))
            )
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
            self.client.follow(
                LEADER_KEY,
                _when_replaced(token, lambda: self.lose_leadership("the key is gone")),
                lambda e: self.lose_leadership(str(e)),
            )
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

    def _hello(self, stream: Stream, hello: Hello, term: Term) -> int:
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
