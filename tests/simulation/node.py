"""One node's agent in virtual time: the real AgentCore, run as agent/driver.py, session.py and presence.py do."""

from collections import deque
from collections.abc import Callable

from simulation.candidate import Candidate
from simulation.clock import Process, Simulation
from simulation.etcd import Etcd, EtcdClient
from simulation.lease import Keeper
from simulation.network import Network, Stream
from simulation.workers import Crew, Training

from elastic_run.agent import events
from elastic_run.agent.actions import (
    Action,
    Announce,
    AskToPark,
    Exit,
    ReservePort,
    ShowFailures,
    StartWorkers,
    StopWorkers,
    Tell,
)
from elastic_run.agent.core import AgentCore
from elastic_run.agent.presence import RETRY_S, SyncListener
from elastic_run.agent.session import CONNECT_DEADLINE_S, RETRY_S_MAX, RETRY_S_MIN
from elastic_run.runtime.edge.store import EventKind, LeaseId, Put, Snapshot, WatchBatch
from elastic_run.runtime.protocol import codec
from elastic_run.runtime.protocol.config import AgentConfig
from elastic_run.runtime.protocol.errors import StoreError
from elastic_run.runtime.protocol.ids import PROTOCOL_VERSION, Incarnation, ViewNumber
from elastic_run.runtime.protocol.messages import (
    AgentMessage,
    AgentPhase,
    ControllerMessage,
    Failure,
    Hello,
    Install,
    JobEnded,
    Prepared,
    Refused,
    Welcome,
)
from elastic_run.runtime.protocol.records import (
    SPEC_KEY,
    SYNC_PREFIX,
    JobResult,
    JobSpec,
    JobState,
    NodeRecord,
    node_key,
)


class Session:
    """agent/session.py: one stream to whoever leads."""

    def __init__(self, node: "Node") -> None:
        self._node = node
        self._address: str | None = None
        self._moved = False
        self._waiting = True
        self._retry_s = RETRY_S_MIN
        self._round = 0
        self._heard = False
        self.stream: Stream | None = None

    def leader_is(self, address: str) -> None:
        if address == self._address:
            return
        self._address, self._moved = address, True
        if self._waiting:
            self._dial_now()
        elif self.stream is not None:
            stream, self.stream = self.stream, None
            stream.close(0, "another controller leads")
            self._ended("another controller leads")

    def tell(self, message: AgentMessage) -> None:
        if self.stream is not None:
            self.stream.send(0, message)

    def close(self) -> None:
        self._round += 1
        if self.stream is not None:
            self.stream.close(0, "the agent ends")

    def _dial_now(self) -> None:
        self._moved, self._retry_s = False, RETRY_S_MIN
        self._dial()

    def _dial(self) -> None:
        address = self._address
        if address is None:
            return
        self._waiting, self._heard, self._moved = False, False, False
        self._round += 1
        number = self._round
        node = self._node

        def read(found: bytes | StoreError | None) -> None:
            if number != self._round:
                return
            if found is None or isinstance(found, StoreError):
                self._ended("the job has no spec yet" if found is None else str(found))
                return
            token = codec.decode(JobSpec, found, where=SPEC_KEY).token
            node.sim.at(node.network.delay_s(), lambda: node.run(lambda: self._connect(number, address, token)))

        node.client.call(lambda: _value(node.etcd, SPEC_KEY), read)

    def _connect(self, number: int, address: str, token: str) -> None:
        if number != self._round:
            return
        node = self._node
        server = node.controllers().get(address)
        reachable = server is None or node.network.both_ways(node.host, server.host)
        if not reachable or (server is not None and server.stalled):
            node.after(CONNECT_DEADLINE_S, lambda: self._given_up(number))
            return
        if server is None or not server.alive:
            self._ended("connection refused")
            return
        stream = node.network.dial(node, server, accepted=server.accept)
        self.stream = stream
        stream.ends[0].on_message = lambda message: self._take(number, message)
        stream.ends[0].on_end = lambda reason: self._broke(number, reason)
        stream.send(0, node.hello(token))

    def _given_up(self, number: int) -> None:
        if number == self._round:
            self._ended("no connection in time")

    def _take(self, number: int, message: ControllerMessage) -> None:
        if number == self._round and self.stream is not None:
            self._heard = self._heard or not isinstance(message, Refused)
            self._node.heard(message)

    def _broke(self, number: int, reason: str) -> None:
        if number != self._round or self.stream is None:
            return
        self.stream = None
        self._ended(reason)

    def _ended(self, reason: str) -> None:
        node = self._node
        if self._heard:
            self._retry_s = RETRY_S_MIN
            node.post(events.ControllerLost(now=node.clock(), reason=reason))
        self._waiting = True
        self._round += 1
        number = self._round
        if self._moved:
            self._dial_now()
            return
        node.after(self._retry_s * node.sim.between(0.5, 1.0), lambda: self._retry(number))

    def _retry(self, number: int) -> None:
        if number == self._round and self._waiting:
            self._retry_s = min(RETRY_S_MAX, 2 * self._retry_s)
            self._dial()


class Presence:
    """agent/presence.py: the node's leased record."""

    def __init__(self, node: "Node", record: NodeRecord, ttl_s: int) -> None:
        self._node, self._record, self._ttl_s = node, record, ttl_s
        self.keeper: Keeper | None = None

    def hold(self) -> None:
        granted_at = self._node.clock()
        etcd = self._node.etcd
        self._node.client.call(lambda: etcd.grant(self._ttl_s), lambda lease: self._granted(lease, granted_at))

    def _granted(self, lease: LeaseId | StoreError, granted_at: float) -> None:
        node = self._node
        if isinstance(lease, StoreError):
            self._again()
            return
        self.keeper = keeper = Keeper(node.client, lease, self._ttl_s, granted_at, lambda _: self._again())
        put = Put(key=node_key(self._record.node), value=codec.encode(self._record), lease_id=lease)

        def wrote(answer: object) -> None:
            if isinstance(answer, StoreError):
                keeper.stop()
                self._again()

        node.client.txn((), (put,), wrote)

    def _again(self) -> None:
        self._node.after(RETRY_S, self.hold)


class Node(Process):
    """One incarnation of a node's agent."""

    def __init__(
        self,
        sim: Simulation,
        config: AgentConfig,
        *,
        life: int,
        etcd: Etcd,
        network: Network,
        training: Training,
        controllers: Callable[[], dict[str, Candidate]],
        core_of: Callable[[AgentConfig, float], AgentCore],
    ) -> None:
        super().__init__(sim, f"{config.node}.{life}", f"host-{config.node}")
        self.config, self.etcd, self.network, self.training = config, etcd, network, training
        self.checkers, self.controllers = training.checkers, controllers
        self.incarnation = Incarnation(f"{config.node}-{life}")
        self.client = EtcdClient(etcd, self)
        self.core = core_of(config, self.clock())
        self.exit_code: int | None = None
        self.said = self.refused = ""
        self.crew: Crew | None = None
        self._stopping = False
        self._inbox: deque[events.AgentEvent] = deque()
        self._handling = False
        self._ports = 20_000
        self.session = Session(self)
        self._listener = SyncListener(
            on_leader=self.session.leader_is, on_current=self._current_seen, on_result=self._result_seen
        )
        record = NodeRecord(node=config.node, incarnation=self.incarnation, address=config.address, nproc=config.nproc)
        self.presence = Presence(self, record, config.lease_ttl_s)
        self._present = False
        self._follow()
        self.after(0.0, self._tick)

    # Life and death

    def kill(self, *, silently: bool = False) -> None:
        """kill -9 of the agent, which takes its workers along; silently: the host lost power."""
        self.tell("is killed" + (" with its host" if silently else ""))
        crew, self.crew = self.crew, None
        self._gone(silently=silently)
        if crew is not None:
            crew.kill(silently=silently)

    def stall(self) -> None:
        super().stall()
        self.network.stalled(self)

    def stall_host(self) -> None:
        self.stall()
        if self.crew is not None:
            self.crew.stalled = True

    def resume(self) -> None:
        if self.crew is not None:
            self.crew.stalled = False
        self.network.resumed(self)
        super().resume()

    def signal(self, number: int) -> None:
        self.run(lambda: self.post(events.SignalReceived(now=self.clock(), signal=number)))

    def _gone(self, *, silently: bool) -> None:
        self.end()
        self.client.close()
        self.network.gone(self, silently=silently)

    # Events

    def post(self, event: events.AgentEvent) -> None:
        """Handle now, or after the event being handled; the driver hears nothing after its exit."""
        if self._asked_to_exit():
            return
        self._inbox.append(event)
        if self._handling:
            return
        self._handling = True
        while self._inbox and self.alive and not self._asked_to_exit():
            taken = self._inbox.popleft()
            actions = self.core.handle(taken)
            self.core.validate()
            if not isinstance(taken, events.Ticked):
                core = self.core
                self.tell(f"{_brief(taken)} => {core.phase} {core.view} of {core.current_view} {core.aim}")
            for action in actions:
                self._execute(action)
        self._handling = False
        if self._asked_to_exit() and self.alive:
            self._close()

    def _asked_to_exit(self) -> bool:
        return self.exit_code is not None

    def heard(self, message: ControllerMessage) -> None:
        if isinstance(message, Welcome) and not self._present:
            self._present = True
            self.presence.hold()
        self.post(events.ControllerSpoke(now=self.clock(), message=message))

    def _tick(self) -> None:
        steps = self.crew.steps if self.crew is not None else 0
        rate = 1.0 / self.training.step_s if steps > 1 else 0.0
        self.post(events.Ticked(now=self.clock(), step_max=steps, step_rate_hz=rate))
        self.checkers.looked(self)
        self.after(self.config.monitor_interval_s, self._tick)

    def _follow(self) -> None:
        self.client.follow(SYNC_PREFIX, self._synced, lambda _: self.after(RETRY_S, self._follow))

    def _synced(self, change: Snapshot | WatchBatch) -> None:
        if isinstance(change, Snapshot):
            pairs = [(kv.key, kv.value) for kv in change.items]
        else:
            pairs = [(e.kv.key, e.kv.value) for e in change.events if e.kind is EventKind.PUT]
        for key, value in pairs:
            self._listener.take(key, value)

    def _current_seen(self, number: ViewNumber) -> None:
        self.post(events.CurrentViewSeen(now=self.clock(), number=number))

    def _result_seen(self, result: JobResult) -> None:
        self.heard(JobEnded(succeeded=result.state is JobState.SUCCEEDED, message=result.message))

    # Actions

    def _execute(self, action: Action) -> None:
        match action:
            case Tell(message=message):
                if isinstance(message, Prepared):
                    self.checkers.acknowledged(self.config.node, self.incarnation, message.view)
                self.session.tell(message)
            case Announce(line=line):
                self.said = line
                self.refused = line if line.startswith("refused: ") else self.refused
                self.tell(f"says: {line}")
            case ReservePort():
                self._ports += 1
                self.post(events.PortReserved(now=self.clock(), port=self._ports))
            case AskToPark():
                self._ask_to_park(action)
            case StopWorkers():
                self._stop_workers(action)
            case StartWorkers(install=install):
                self._start_workers(install)
            case ShowFailures():
                pass
            case Exit(code=code):
                self.exit_code = code

    def _ask_to_park(self, action: AskToPark) -> None:
        def parked() -> None:
            self.post(events.WorkersParked(now=self.clock(), view=action.view))

        if self.crew is not None:
            self.crew.ask_to_park(action.step, parked)

    def _stop_workers(self, action: StopWorkers) -> None:
        crew = self.crew
        if self._stopping:
            if crew is not None:
                crew.stop(action.term_s)
            return
        self._stopping, starts = True, self.core.starts

        def stopped() -> None:
            self._stopping = False
            for stray in self.training.crews:  # what is still below this process is killed
                if stray.agent is self and stray is not crew:
                    stray.kill()
            self.post(events.WorkersStopped(now=self.clock(), starts=starts))

        if crew is None:
            self.after(0.0, stopped)
        else:
            crew.stop(action.term_s, stopped)

    def _start_workers(self, install: Install) -> None:
        self.checkers.starting(self, install)
        self.crew = Crew(self.training, self, install, self.config.nproc, self._exited)

    def _exited(self, view: ViewNumber, local_rank: int, failure: Failure | None) -> None:
        self.post(events.WorkerExited(now=self.clock(), view=view, local_rank=local_rank, failure=failure))

    def hello(self, token: str) -> Hello:
        config, job, core = self.config, self.config.job, self.core
        if core.phase is AgentPhase.PREPARED:
            self.checkers.acknowledged(config.node, self.incarnation, core.view)
        return Hello(
            protocol_version=PROTOCOL_VERSION,
            job_id=job.job_id,
            token=token,
            node=config.node,
            incarnation=self.incarnation,
            address=config.address,
            nproc=config.nproc,
            node_rank=config.node_rank,
            nodes_min=job.nodes_min,
            nodes_max=job.nodes_max,
            max_restarts=job.max_restarts,
            state=core.state,
            master_port=core.master_port if core.phase is AgentPhase.PREPARED else None,
            failures=core.aged_failures(self.clock()),
        )

    # The end

    def _close(self) -> None:
        """As the driver: stop what runs, say what was said, give the lease back, end."""
        self.tell(f"exits with {self.exit_code}")
        self.checkers.exited(self)
        if self.crew is not None:
            self.crew.stop(0.0)
        self.session.close()
        keeper = self.presence.keeper
        if keeper is None:
            self._gone(silently=False)
            return
        keeper.stop()
        self.client.call(
            lambda: self.etcd.revoke(keeper.lease_id), lambda _: self._gone(silently=False), deadline_s=1.0
        )


def _value(etcd: Etcd, key: str) -> bytes | None:
    found = etcd.keys.get(key)
    return None if found is None else found.value


def _brief(event: events.AgentEvent) -> str:
    match event:
        case events.ControllerSpoke(message=message):
            return f"{type(message).__name__} {getattr(message, 'view', '')}"
        case events.WorkerExited(view=view, local_rank=local_rank, failure=failure):
            return f"WorkerExited {view} {local_rank} {'failed' if failure else 'well'}"
        case events.CurrentViewSeen(number=number):
            return f"CurrentViewSeen {number}"
        case _:
            return type(event).__name__
