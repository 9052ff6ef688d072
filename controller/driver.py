"""Runs the controller: wins leadership, feeds events to the core, executes its actions in order.

Invariants:
1. Actions are executed one after the other; a Persist that is not durable yet holds back everything behind it
   (tests/integration/test_controller.py).
2. Every write carries the leader's fence; when it is lost the term ends, whatever was not executed is dropped, and all
   streams are closed: agents come back with their state to whoever leads next.
3. A store that is away is waited for; training needs nothing from here meanwhile.
Not here: decisions (core.py), sockets (server.py), elections (runtime/edge/election.py).
"""

import asyncio
import itertools
import logging
import secrets
import time
from contextlib import aclosing

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
from elastic_run.controller.node_leases import NodeLeases
from elastic_run.controller.report import report
from elastic_run.controller.server import AgentServer
from elastic_run.runtime.edge.election import Fence, campaign, fenced_txn, resign, until_lost
from elastic_run.runtime.edge.lease import LeaseKeeper
from elastic_run.runtime.edge.log import OutageLog
from elastic_run.runtime.edge.store import Delete, Put, Snapshot, Store, Write, absent, follow
from elastic_run.runtime.edge.tasks import cancel_all
from elastic_run.runtime.protocol import codec
from elastic_run.runtime.protocol.config import ControllerConfig
from elastic_run.runtime.protocol.errors import FenceLost, StoreCorrupt, StoreError, StoreUncertain
from elastic_run.runtime.protocol.ids import FencingToken, JobId
from elastic_run.runtime.protocol.messages import AgentMessage, Hello, StatusReport
from elastic_run.runtime.protocol.records import (
    LEADER_KEY,
    RESULT_KEY,
    JobSpec,
    LeaderRecord,
    NodeRecord,
    decode_job,
)

TICK_BUSY_S = 0.05  # while something waits for a time-out below a second
TICK_IDLE_S = 0.5
EVENTS_QUEUED_MAX = 100_000
ACTIONS_QUEUED_MAX = 100_000
STORE_RETRY_S = 0.5
FAREWELL_S = 5.0  # after the job's end: for agents to take note
TOKEN_BYTES = 16

log = logging.getLogger("elastic_run.controller")


class TermOver(Exception):
    """Leadership ended; the message says why."""


class ControllerDriver:
    """One candidate. `run()` returns when the job has ended."""

    def __init__(self, config: ControllerConfig, store: Store) -> None:
        self._config, self._store = config, store
        self.core: ControllerCore | None = None
        self._inbox: asyncio.Queue[ControllerEvent] = asyncio.Queue(EVENTS_QUEUED_MAX)
        self._outbox: asyncio.Queue[Action] = asyncio.Queue(ACTIONS_QUEUED_MAX)
        self._causes = itertools.count(1)
        self._address = ""
        self.metrics_port: int | None = None
        """Where /metrics is served, for the leader's record; set before run()."""
        self.outage = OutageLog(log, "the store")
        self._ended = asyncio.Event()
        self.server = AgentServer(
            on_connected=self._connected, on_spoke=self._spoke, on_disconnected=self._disconnected, report=self._report
        )

    @property
    def job_id(self) -> JobId:
        return self._config.job.job_id

    async def run(self) -> None:
        """Campaign and lead until the job has ended. Raises StoreCorrupt when the job's keys are not ours."""
        port = await self.server.start(self._config.host, self._config.port)
        self._address = f"{self._config.host}:{port}"
        log.info("controller %s listens on %s", self._config.candidate, self._address)
        try:
            while not await self._term():  # noqa: ASYNC110 - a pause between two terms, not a wait for a state
                await asyncio.sleep(STORE_RETRY_S)
        finally:
            await self.server.stop()

    async def _term(self) -> bool:
        """Wait for leadership and lead for as long as it lasts. Returns whether the job has ended."""
        try:
            granted_at = time.monotonic()
            lease_id = await self._store.lease_grant(self._config.lease_ttl_s)
        except StoreCorrupt:
            raise
        except StoreError as error:
            self.outage.failed(time.monotonic(), error)
            return False
        self.outage.worked(time.monotonic())
        keeper = LeaseKeeper(self._store, lease_id, self._config.lease_ttl_s, granted_at_s=granted_at)
        try:
            async with keeper:
                return await self._candidacy(keeper)
        except TermOver as over:
            log.warning("leadership ended: %s", over)
        except StoreCorrupt:
            raise
        except StoreError as error:
            self.outage.failed(time.monotonic(), error)
        finally:
            await self._give_back(keeper)
        return False

    async def _give_back(self, keeper: LeaseKeeper) -> None:
        try:
            await self._store.lease_revoke(keeper.lease_id, deadline_s=1.0)
        except StoreError as error:
            log.info("the lease runs out by itself: %s", error)

    async def _candidacy(self, keeper: LeaseKeeper) -> bool:
        await self._check_records()
        config = self._config
        record = LeaderRecord(candidate=config.candidate, address=self._address, metrics_port=self.metrics_port)
        value = codec.encode(record)
        tasks = [
            asyncio.create_task(campaign(self._store, key=LEADER_KEY, value=value, lease_id=keeper.lease_id)),
            asyncio.create_task(keeper.lost.wait()),
            asyncio.create_task(self._until_result()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            winning, lost, result = tasks
            if result.done() and not winning.done():  # who ended the job may be gone before all agents were told
                await asyncio.wait((winning, lost), timeout=2 * FAREWELL_S, return_when=asyncio.FIRST_COMPLETED)
            if winning.done():
                return await self._lead(keeper, winning.result())  # type: ignore[arg-type]
            if result.done() and not result.exception():
                return True
            raise TermOver(keeper.reason if lost.done() else "the campaign was cut short")
        finally:
            await cancel_all(tasks)

    async def _check_records(self) -> None:
        """Raise StoreCorrupt or VersionMismatch before anything is written where others keep something."""
        found = await self._store.list("")
        decode_job(self.job_id, ((item.key, item.value) for item in found.items))

    async def _until_result(self) -> None:
        """Return when some other controller has ended the job."""
        async with aclosing(follow(self._store, RESULT_KEY)) as changes:
            async for change in changes:
                found = change.items if isinstance(change, Snapshot) else change.events
                if found:
                    return

    async def _lead(self, keeper: LeaseKeeper, fence: Fence) -> bool:
        async with aclosing(follow(self._store, "")) as changes:
            snapshot = await anext(changes)
            if not isinstance(snapshot, Snapshot):
                raise StoreCorrupt("the first answer of a listing is not a snapshot")
            began = self._term_began(fence, snapshot)
            core = ControllerCore(began)
            leases = NodeLeases(began.records.nodes, on_seen=self._lease_seen, on_gone=self._lease_gone)
            self.core, self._inbox, self._outbox = core, asyncio.Queue(EVENTS_QUEUED_MAX), asyncio.Queue()
            self._ended.clear()
            self._queue(core.begin(time.time()))
            log.info("leads job %s with fencing token %d", core.job.job_id, fence.token)
            self.server.leading = True
            tasks = [
                asyncio.create_task(self._consume(core), name="core"),
                asyncio.create_task(self._execute(fence), name="executor"),
                asyncio.create_task(leases.follow(changes), name="watch"),
                asyncio.create_task(until_lost(self._store, fence), name="fence"),
                asyncio.create_task(keeper.lost.wait(), name="lease"),
                asyncio.create_task(self._until_ended(core), name="end"),
            ]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if task.exception() is not None:
                        raise task.exception()  # type: ignore[misc]
                names = sorted(task.get_name() for task in done)
                if "end" not in names:
                    raise TermOver(keeper.reason or f"the leader's key is not ours any more ({', '.join(names)})")
                await resign(self._store, fence)
                return True
            finally:
                self.server.leading = False
                self.core = None
                self.server.close_all()
                await cancel_all(tasks)

    def _term_began(self, fence: Fence, snapshot: Snapshot) -> TermBegan:
        job = self._config.job
        records = decode_job(job.job_id, ((kv.key, kv.value) for kv in snapshot.items))
        return TermBegan(
            now=time.monotonic(),
            token=FencingToken(fence.token),
            candidate=self._config.candidate,
            records=records,
            fresh_spec=JobSpec(job=job, token=secrets.token_hex(TOKEN_BYTES)),
        )

    # Events

    def _post(self, event: ControllerEvent) -> None:
        if self._inbox.full():
            raise TermOver(f"{EVENTS_QUEUED_MAX} events wait: this controller can not keep up")
        self._inbox.put_nowait(event)

    def _stamp(self) -> dict[str, float | str]:
        return {"now": time.monotonic(), "wall": time.time(), "cause": f"e{next(self._causes)}"}

    def _connected(self, connection: int, hello: Hello) -> None:
        self._post(AgentConnected(connection=connection, hello=hello, **self._stamp()))  # type: ignore[arg-type]

    def _spoke(self, connection: int, message: AgentMessage) -> None:
        self._post(AgentSpoke(connection=connection, message=message, **self._stamp()))  # type: ignore[arg-type]

    def _disconnected(self, connection: int, reason: str) -> None:
        self._post(AgentDisconnected(connection=connection, reason=reason, **self._stamp()))  # type: ignore[arg-type]

    def _report(self) -> StatusReport | None:
        return report(self.core) if self.core is not None else None

    async def _consume(self, core: ControllerCore) -> None:
        while True:
            timeout_s = TICK_IDLE_S if core.settled else TICK_BUSY_S
            try:
                async with asyncio.timeout(timeout_s):  # wait_for drops a cancellation that comes with an event
                    event = await self._inbox.get()
            except TimeoutError:
                event = Ticked(**self._stamp())  # type: ignore[arg-type]
            self._queue(core.handle(event))

    def _lease_seen(self, record: NodeRecord) -> None:
        self._post(NodeLeaseSeen(record=record, **self._stamp()))  # type: ignore[arg-type]

    def _lease_gone(self, record: NodeRecord) -> None:
        self._post(
            NodeLeaseGone(node=record.node, incarnation=record.incarnation, **self._stamp())  # type: ignore[arg-type]
        )

    # Actions

    def _queue(self, actions: list[Action]) -> None:
        for action in actions:
            if self._outbox.qsize() >= ACTIONS_QUEUED_MAX:
                raise TermOver(f"{ACTIONS_QUEUED_MAX} actions wait for the store")
            self._outbox.put_nowait(action)

    async def _execute(self, fence: Fence) -> None:
        while True:
            action = await self._outbox.get()
            match action:
                case Persist():
                    await self._persist(fence, action)
                case Send():
                    self.server.send(action.connection, action.message)
                case CloseConnection():
                    self.server.close(action.connection)
                case EndJob():
                    log.info("the job has ended: %s: %s", action.result.state, action.result.message)
                    self._ended.set()

    async def _persist(self, fence: Fence, action: Persist) -> None:
        compares = tuple(absent(put.key) for put in action.puts if put.create)
        writes: list[Write] = [Put(key=put.key, value=codec.encode(put.record)) for put in action.puts]
        writes += [Delete(key=key) for key in action.deletes]
        while True:
            try:
                result = await fenced_txn(self._store, fence, compares, writes)
            except StoreUncertain as error:
                raise TermOver(f"a write may or may not have happened, the next term will see: {error}") from None
            except FenceLost as error:
                raise TermOver(str(error)) from None
            except StoreError as error:
                self.outage.failed(time.monotonic(), error)
                await asyncio.sleep(STORE_RETRY_S)
                continue
            self.outage.worked(time.monotonic())
            if not result.succeeded:
                keys = ", ".join(put.key for put in action.puts if put.create)
                raise StoreCorrupt(f"somebody else wrote one of {keys} of job {self._config.job.job_id}")
            for put in action.puts:
                log.info("%s %s", put.key, put.record)
            return

    async def _until_ended(self, core: ControllerCore) -> None:
        """Return when the result is durable and the agents took note, or had the time to."""
        late = core.result is not None  # it ended under another leader: agents that missed it have yet to come
        if not late:
            await self._ended.wait()
        deadline = time.monotonic() + FAREWELL_S
        while (late or self.server.open_streams) and time.monotonic() < deadline:  # noqa: ASYNC110 - bounded and rare
            await asyncio.sleep(TICK_BUSY_S)
