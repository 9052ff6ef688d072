"""Starts, watches and ends the workers of one view on this node.

Each worker leads a process group of its own and dies with the agent. Its end is reported as soon as its pidfd tells,
with what is known about the failure; its group is killed with it.

Invariants (tests/integration/test_worker_group.py):
1. After stop() no process started by a worker is left: not one that ignored SIGTERM, nor one in another session.
2. Every started worker is reported exactly once, before stop() returns.
3. A worker that cannot be started is an answer, not an exception, and leaves nothing behind.
4. All output written before the end has been passed on when stop() returns.
Not here: when to start and stop (core.py); signals and pidfds (runtime/edge/process.py); where output goes (output.py).
"""

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import socket
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass

from elastic_run.agent.environment import WorkerPaths, WorkerSeat, worker_command, worker_environment
from elastic_run.agent.failure import Ending, WorkerFailure, WorkerIdentity, read_error_file, worker_failure
from elastic_run.agent.output import LogDirectory
from elastic_run.agent.streams import AttemptStreams
from elastic_run.runtime.edge import telemetry
from elastic_run.runtime.edge.process import Exit, Process, kill_strays, set_subreaper, spawn
from elastic_run.runtime.protocol.config import AgentConfig
from elastic_run.runtime.protocol.errors import UserError
from elastic_run.runtime.protocol.ids import Incarnation
from elastic_run.runtime.protocol.messages import Install

INCARNATION_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerExited:
    """A worker ended, for whatever reason."""

    local_rank: int
    rank: int
    pid: int
    exit: Exit
    failure: WorkerFailure | None
    """None when it exited with 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpawnFailed:
    """A worker could not be started; those before it were ended again."""

    local_rank: int
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a group shares with the rest of its agent."""

    agent_socket: str
    environment: Mapping[str, str]
    """The agent's own, on which the workers' is built."""
    logs: LogDirectory
    report: Callable[[WorkerExited], None]
    say: Callable[[str], None]
    """Takes one line for the user; called in the event loop."""
    bystanders: Callable[[], Container[int]] = frozenset
    """Pids of this process's children that are not the group's; stop() takes any other child for a stray. Asked once,
    when the workers are gone: no child may be started from then until stop() has ended."""


@dataclass(slots=True, kw_only=True)
class Worker:
    """One started worker."""

    local_rank: int
    rank: int
    incarnation: Incarnation
    telemetry_path: str
    error_path: str
    started_unix_s: float
    process: Process

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.exit is None


class WorkerGroup:
    """The node's workers in one view: started once, stopped in the end. Lives in the main thread's event loop."""

    def __init__(self, config: AgentConfig, install: Install, surroundings: Surroundings) -> None:
        self.workers: list[Worker] = []
        """By local rank."""
        self._config = config
        self._install = install
        self._around = surroundings
        self._host = socket.gethostname()
        self._watchers: list[asyncio.Task[None]] = []
        self._streams: AttemptStreams | None = None
        self._stop_began_s: float | None = None

    async def start(self) -> SpawnFailed | None:
        """Start all workers, or none."""
        try:
            set_subreaper()
            around = self._around
            self._streams = AttemptStreams(self._config, around.logs, around.environment, around.say)
            for local_rank in range(self._config.nproc):
                self.workers.append(self._spawn(local_rank, self._streams))
        except (OSError, UserError) as error:
            local_rank = len(self.workers)
            message = f"worker {local_rank} of {self._config.nproc} could not be started: {_said(error)}"
            await self.stop(0.0)
            return SpawnFailed(local_rank=local_rank, message=message)
        loop = asyncio.get_running_loop()
        self._watchers = [loop.create_task(self._watch(worker)) for worker in self.workers]
        return None

    async def stop(self, term_s: float, number: int = signal.SIGTERM) -> None:
        """End everything: signal each group, SIGKILL after `term_s` seconds, then whatever escaped the groups.

        A second call may overlap the first, to shorten its patience; a cancelled one kills all groups at once. Raises
        InvariantViolated when a killed process does not go away (it hangs in the kernel).
        """
        if self._stop_began_s is None:
            self._stop_began_s = time.monotonic()
        try:
            await asyncio.gather(*(worker.process.stop(term_s, number) for worker in self.workers if worker.alive))
        except asyncio.CancelledError:  # perhaps before any of these had begun
            for worker in self.workers:
                worker.process.signal_group(signal.SIGKILL)
            raise
        if self._watchers:
            await asyncio.wait(self._watchers)  # not gather: a cancelled stop() must not cancel the reports
        for watcher in self._watchers:
            watcher.result()
        await kill_strays(self._around.bystanders())
        if self._streams is not None:
            await self._streams.finish()
        for worker in self.workers:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(worker.telemetry_path)

    @property
    def alive(self) -> int:
        return sum(worker.alive for worker in self.workers)

    def reap_orphans(self) -> None:
        """Collect dead descendants that were left to this process, so that a long job does not fill the process table.

        Cheap; to be called now and then while the group runs.
        """
        known = {worker.pid for worker in self.workers if worker.alive}
        bystanders = self._around.bystanders()
        with contextlib.suppress(ChildProcessError):  # no children at all
            while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                if found.si_pid in known or found.si_pid in bystanders:
                    return  # hides those behind it, until its owner has collected it
                os.waitpid(found.si_pid, os.WNOHANG)

    def _spawn(self, local_rank: int, streams: AttemptStreams) -> Worker:
        rank = self._install.first_rank + local_rank
        seat = WorkerSeat(
            local_rank=local_rank, incarnation=Incarnation(secrets.token_hex(INCARNATION_BYTES)), agent_pid=os.getpid()
        )
        paths = WorkerPaths(
            agent_socket=self._around.agent_socket,
            telemetry=f"{self._config.run_dir}/w{self._install.view}.{local_rank}.telemetry",
            error_file=streams.error_path(local_rank),
        )
        argv = worker_command(self._config.command, local_rank)
        environment = worker_environment(self._config, self._install, seat, paths, self._around.environment)
        if shutil.which(argv[0], path=environment.get("PATH", os.defpath)) is None:
            raise UserError(f"{argv[0]} is no program that can be executed")
        telemetry.create(paths.telemetry, rank, self._install.world_size, self._install.view)
        try:
            with streams.opened(local_rank, rank) as (stdout, stderr):
                cpus = self._config.cpus[local_rank] if self._config.cpus else ()
                process = spawn(argv, env=environment, stdout=stdout, stderr=stderr, cpus=cpus)
        except (OSError, UserError):
            os.unlink(paths.telemetry)
            raise
        return Worker(
            local_rank=local_rank,
            rank=rank,
            incarnation=seat.incarnation,
            telemetry_path=paths.telemetry,
            error_path=paths.error_file,
            started_unix_s=time.time(),
            process=process,
        )

    async def _watch(self, worker: Worker) -> None:
        exit_ = await worker.process.wait()
        failure = None if exit_.ok else self._failure(worker, exit_)
        self._around.report(
            WorkerExited(local_rank=worker.local_rank, rank=worker.rank, pid=worker.pid, exit=exit_, failure=failure)
        )

    def _failure(self, worker: Worker, exit_: Exit) -> WorkerFailure:
        ending = Ending(
            exit=exit_,
            started_unix_s=worker.started_unix_s,
            exited_unix_s=time.time(),
            exited_s=time.monotonic(),
            stop_began_s=self._stop_began_s,
        )
        identity = WorkerIdentity(
            node=self._config.node, host=self._host, rank=worker.rank, local_rank=worker.local_rank, pid=worker.pid
        )
        kept = self._streams is not None and self._streams.errors_kept
        report = read_error_file(worker.error_path)
        return worker_failure(identity, ending, report, worker.error_path if kept else None)


def _said(error: OSError | UserError) -> str:
    if isinstance(error, UserError):
        return str(error)
    return f"{error.strerror} ({error.filename})" if error.filename else str(error.strerror)
