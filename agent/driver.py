"""Runs one node's agent: feeds events to the core, executes its actions, owns everything that has to be closed.

Invariants (tests/integration/test_agent.py):
1. run() returns only when no worker, socket, lease or telemetry file of this agent is left.
2. Loss of the controller or the store stops nothing here.
Not here: decisions (core.py), processes (workers.py), the stream (session.py), the lease (presence.py).
"""

import asyncio
import contextlib
import dataclasses
import logging
import os
import secrets
import signal
import time
from typing import Any

from elastic_run.agent import events, failure, master_port, workers
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
from elastic_run.agent.output import LogDirectory
from elastic_run.agent.presence import Presence, SyncListener, follow_sync, read_token
from elastic_run.agent.session import ControllerSession
from elastic_run.runtime.edge.store import Store
from elastic_run.runtime.edge.tasks import cancel_all
from elastic_run.runtime.edge.telemetry import Telemetry, TelemetryFile
from elastic_run.runtime.edge.worker_server import WorkerEvent, WorkerHello, WorkerParked, WorkerServer
from elastic_run.runtime.protocol import codec
from elastic_run.runtime.protocol.config import AgentConfig
from elastic_run.runtime.protocol.errors import CodecError, PeerRefused, StoreError
from elastic_run.runtime.protocol.ids import PROTOCOL_VERSION, Incarnation, ViewNumber
from elastic_run.runtime.protocol.messages import (
    AgentPhase,
    ControllerMessage,
    Failure,
    Hello,
    Install,
    JobEnded,
    Welcome,
)
from elastic_run.runtime.protocol.records import CURRENT_KEY, CurrentView, JobResult, JobState, NodeRecord

EVENTS_QUEUED_MAX = 10_000
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
STDERR = 2
ORPHAN_STOP_S = 5.0
"""What workers get between SIGTERM and SIGKILL when the launcher has died: nobody waits for them any more."""
FLUSH_S = 1.0
CONFIRM_RETRY_S = 0.5
RECORDS_READ = 32  # enough for a rate; reading the whole ring takes half a millisecond
INCARNATION_BYTES = 8

log = logging.getLogger("elastic_run.agent")


class AgentDriver:
    def __init__(self, config: AgentConfig, store: Store) -> None:
        self._config, self._store = config, store
        self.core = AgentCore(config, time.monotonic())
        self._incarnation = Incarnation(secrets.token_hex(INCARNATION_BYTES))
        self._inbox: asyncio.Queue[events.AgentEvent] = asyncio.Queue(EVENTS_QUEUED_MAX)
        self.exit_code: int | None = None
        self.orphaned = False
        """The launcher died: nobody but this agent is left to clear up."""
        self._launcher_pid = os.getppid()
        self._logs = LogDirectory(config.output, config.job.job_id, config.run_dir)
        self._group: workers.WorkerGroup | None = None
        self._group_view = ViewNumber(0)
        self._telemetry: list[TelemetryFile] = []
        self._parked: dict[Incarnation, int] = {}
        self._park_view = ViewNumber(0)
        self._failures: list[failure.WorkerFailure] = []
        self._port: master_port.ReservedPort | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[Any]] = []
        self._short: set[asyncio.Task[Any]] = set()
        self._next_tick = 0.0
        self._beaten_at = time.monotonic()
        self._unsure = False
        """This process was held up; whether the node is still in the job is being found out."""
        self._socket_path = os.path.join(config.run_dir, "agent.sock")
        self._server = WorkerServer(self._socket_path, self._admit, self._worker_said)
        self.presence = Presence(store, self._record(), config.lease_ttl_s)
        self._present = False
        self._session = ControllerSession(
            read_token=lambda: read_token(store), hello=self._hello, on_message=self._heard, on_lost=self._lost
        )

    async def run(self) -> int:
        """Take part in the job until it ends or this node leaves it; return the exit code."""
        loop = asyncio.get_running_loop()
        for name in dict.fromkeys((*self._config.signals, *SIGNALS)):  # what the launcher passes on, whatever is asked
            number = signal.Signals[name]
            loop.add_signal_handler(number, self._signalled, number)
        await self._server.start()
        self._spawn(self._session.run(), "session")
        listener = SyncListener(
            on_leader=self._session.leader_is, on_current=self._current_seen, on_result=self._result_seen
        )
        self._spawn(follow_sync(self._store, listener), "sync")
        try:
            while self.exit_code is None:
                await self._step()
        finally:
            await self._close()
        return self.exit_code

    async def _step(self) -> None:
        """Handle one event; without one, tick. A task that ended by itself has failed: that ends the agent."""
        for task in self._tasks:
            if task.done():
                task.result()
                raise RuntimeError(f"task {task.get_name()} ended by itself")
        try:
            event = await asyncio.wait_for(self._inbox.get(), max(0.0, self._next_tick - time.monotonic()))
        except TimeoutError:
            event = self._ticked()
        for action in self.core.handle(event):
            await self._execute(action)

    def _ticked(self) -> events.Ticked:
        now = time.monotonic()
        self._next_tick = now + self._config.monitor_interval_s
        if self._group is not None:
            self._group.reap_orphans()
        self._beat(now)
        read = [t for t in map(_read, self._telemetry) if t is not None]
        rates = [rate for rate in (t.step_rate_per_s() for t in read) if rate is not None]
        return events.Ticked(
            now=now, step_max=max((t.step for t in read), default=0), step_rate_hz=max(rates, default=0.0)
        )

    def _beat(self, now: float) -> None:
        """Let workers go on, unless this process was held up so long that the node may have been left out meanwhile."""
        held_up = now - self._beaten_at >= self._config.lease_ttl_s and not self.presence.held
        self._beaten_at = now
        if held_up and self._telemetry and not self._unsure:
            self._unsure = True
            self._spawn_short(self._confirm_view())
        if not self._unsure:
            for file in self._telemetry:
                file.beat()

    async def _confirm_view(self) -> None:
        """Ask the store which view is installed; workers wait until the core has heard the answer."""
        while True:
            try:
                found = await self._store.get(CURRENT_KEY)
                if found is not None:
                    self._current_seen(codec.decode(CurrentView, found.value, where=CURRENT_KEY).number)
                break
            except (StoreError, CodecError) as error:
                log.info("whether this node is still in the job can not be found out: %s", error)
                await asyncio.sleep(CONFIRM_RETRY_S)
        self._unsure = False

    # Actions

    async def _execute(self, action: Action) -> None:
        match action:
            case Tell():
                self._session.tell(action.message)
            case Announce():
                self.say(action.line)
            case ReservePort():
                self._reserve_port()
            case AskToPark():
                self._ask_to_park(action)
            case StopWorkers():
                self._stop_workers(action)
            case StartWorkers():
                await self._start_workers(action.install)
            case ShowFailures():
                title = f"job {self._config.job.job_id} failed"
                write_to_stderr(failure.render(title, self._failures))
            case Exit():
                self.exit_code = action.code

    def say(self, line: str) -> None:
        write_to_stderr(f"elastic-run: {line}")

    def _reserve_port(self) -> None:
        if self._port is not None:
            self._port.close()
        self._port = master_port.reserve()
        self._post(events.PortReserved(now=time.monotonic(), port=self._port.port))

    def _ask_to_park(self, action: AskToPark) -> None:
        self._parked, self._park_view = {}, action.view
        for file in self._telemetry:
            file.request_stop(at_step=action.step, view=action.view)

    def _stop_workers(self, action: StopWorkers) -> None:
        group = self._group
        if self._stopping is not None and not self._stopping.done():
            if group is not None:  # the first call posts the event, this one only shortens its patience
                self._spawn_short(group.stop(action.term_s, action.signal))
            return
        self._stopping = asyncio.create_task(self._stop_group(group, action), name="stop-workers")

    async def _stop_group(self, group: workers.WorkerGroup | None, action: StopWorkers) -> None:
        starts = self.core.starts
        if group is not None:
            await group.stop(action.term_s, action.signal)
        self._close_telemetry()
        self._post(events.WorkersStopped(now=time.monotonic(), starts=starts))

    async def _start_workers(self, install: Install) -> None:
        self._failures, self._parked, self._park_view = [], {}, ViewNumber(0)
        around = workers.Surroundings(
            agent_socket=self._socket_path,
            environment=os.environ,
            logs=self._logs,
            report=lambda exited: self._exited(install.view, exited),
            say=self.say,
            bystanders=lambda: self._workers_other_than(group),
        )
        group = workers.WorkerGroup(self._config, install, around)
        self._group, self._group_view = group, install.view
        failed = await group.start()
        if failed is not None:
            self._spawn_failed(install, failed)
            return
        self._telemetry = [TelemetryFile(worker.telemetry_path) for worker in group.workers]

    def _workers_other_than(self, group: workers.WorkerGroup) -> frozenset[int]:
        """A late second stop of an older group must not take the next group's workers for strays."""
        current = self._group
        return frozenset() if current is None or current is group else frozenset(w.pid for w in current.workers)

    def _spawn_failed(self, install: Install, failed: workers.SpawnFailed) -> None:
        story = Failure(
            node=self._config.node,
            rank=install.first_rank + failed.local_rank,
            local_rank=failed.local_rank,
            pid=0,
            exit_code=None,
            signal=None,
            message=failed.message,
            traceback="",
            age_s=0.0,
        )
        now = time.monotonic()
        self._post(events.WorkerExited(now=now, view=install.view, local_rank=failed.local_rank, failure=story))

    # Events

    def _post(self, event: events.AgentEvent) -> None:
        self._inbox.put_nowait(event)

    def _exited(self, view: ViewNumber, exited: workers.WorkerExited) -> None:
        now = time.monotonic()
        message = None
        if exited.failure is not None:
            self._failures.append(exited.failure)
            message = exited.failure.as_message(now)
        self._post(events.WorkerExited(now=now, view=view, local_rank=exited.local_rank, failure=message))
        self._tell_if_parked()

    def _heard(self, message: ControllerMessage) -> None:
        if isinstance(message, Welcome) and not self._present:
            self._present = True  # only a node that was taken in shows itself in the store
            self._spawn(self.presence.run(), "presence")
        self._post(events.ControllerSpoke(now=time.monotonic(), message=message))

    def _lost(self, reason: str) -> None:
        self._post(events.ControllerLost(now=time.monotonic(), reason=reason))

    def _current_seen(self, number: ViewNumber) -> None:
        self._post(events.CurrentViewSeen(now=time.monotonic(), number=number))

    def _result_seen(self, result: JobResult) -> None:
        """The store says how the job ended: the controller's own word may have been lost with its stream."""
        self._heard(JobEnded(succeeded=result.state is JobState.SUCCEEDED, message=result.message))

    def _signalled(self, number: int) -> None:
        if number == signal.SIGTERM and not self.orphaned and os.getppid() != self._launcher_pid:
            self.orphaned = True
            self.say("the launcher of this node is gone; its workers are ended")
            limit_s = min(ORPHAN_STOP_S, self._config.shutdown_timeout_s)
            self.core.config = dataclasses.replace(self._config, shutdown_timeout_s=limit_s)
        self._post(events.SignalReceived(now=time.monotonic(), signal=number))

    def _admit(self, hello: WorkerHello) -> ViewNumber:
        for worker in self._group.workers if self._group is not None else ():
            if worker.incarnation == hello.worker and worker.alive:
                return self._group_view  # the core may be preparing the next one already
        raise PeerRefused("this agent runs no such worker")

    def _worker_said(self, event: WorkerEvent) -> None:
        if isinstance(event, WorkerParked) and event.view == self._park_view and self._group is not None:
            self._parked[event.worker] = event.step
            self._tell_if_parked()

    def _tell_if_parked(self) -> None:
        """Post that every living worker is parked; one that ends instead is not waited for."""
        if self._group is None or not self._park_view:
            return
        if all(worker.incarnation in self._parked for worker in self._group.workers if worker.alive):
            self._post(events.WorkersParked(now=time.monotonic(), view=self._park_view))

    # What others are told

    def _record(self) -> NodeRecord:
        config = self._config
        return NodeRecord(node=config.node, incarnation=self._incarnation, address=config.address, nproc=config.nproc)

    def _hello(self, token: str) -> Hello:
        config, job, core = self._config, self._config.job, self.core
        return Hello(
            protocol_version=PROTOCOL_VERSION,
            job_id=job.job_id,
            token=token,
            node=config.node,
            incarnation=self._incarnation,
            address=config.address,
            nproc=config.nproc,
            node_rank=config.node_rank,
            nodes_min=job.nodes_min,
            nodes_max=job.nodes_max,
            max_restarts=job.max_restarts,
            state=core.state,
            master_port=core.master_port if core.phase is AgentPhase.PREPARED else None,
            failures=core.aged_failures(time.monotonic()),
        )

    # The end

    def _spawn(self, coroutine: Any, name: str) -> None:
        self._tasks.append(asyncio.create_task(coroutine, name=name))

    def _spawn_short(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._short.add(task)
        task.add_done_callback(self._short.discard)

    def _close_telemetry(self) -> None:
        for file in self._telemetry:
            file.close()
        self._telemetry = []

    async def _close(self) -> None:
        """Leave nothing behind, also when an exception ends the agent."""
        if self._group is not None:
            await self._group.stop(0.0)
        await self._session.flush(FLUSH_S)
        await self.presence.leave()
        await cancel_all((*self._tasks, *self._short))
        self._close_telemetry()
        if self._port is not None:
            self._port.close()
        await self._server.close()


def _read(file: TelemetryFile) -> Telemetry | None:
    try:
        return file.read(records_max=RECORDS_READ)
    except CodecError as error:
        log.warning("telemetry is unreadable: %s", error)
        return None


def write_to_stderr(text: str) -> None:
    left = f"{text}\n".encode(errors="backslashreplace")
    with contextlib.suppress(OSError):  # nobody listens any more; that must not end a job, nor change its exit code
        while left:
            left = left[os.write(STDERR, left) :]
