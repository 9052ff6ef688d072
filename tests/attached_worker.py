"""Runs scripts in real processes under the bootstrap, tied to a WorkerServer and telemetry file of this process."""

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import elastic_run
from elastic_run.runtime.edge import telemetry
from elastic_run.runtime.edge.telemetry import TelemetryFile
from elastic_run.runtime.edge.worker_server import WorkerEvent, WorkerHello, WorkerServer
from elastic_run.runtime.protocol.ids import Incarnation, ViewNumber

BOUND_S = 60.0
BEAT_S = 0.5
BOOTSTRAP = os.path.join(os.path.dirname(elastic_run.__file__), "runtime", "bootstrap.py")
WORKER = Incarnation("w-1")
VIEW = ViewNumber(1)


@dataclass(frozen=True, slots=True)
class Ended:
    code: int
    out: str
    err: str


@dataclass(slots=True)
class Seat:
    """What an agent gives one worker, and what it hears from it."""

    folder: str
    server: WorkerServer
    telemetry: TelemetryFile
    events: list[WorkerEvent]
    news: asyncio.Condition
    environment: dict[str, str] = field(default_factory=dict)
    silent: bool = False
    """Set it to stop the agent's signs of life."""

    async def heard(self, kind: type[WorkerEvent]) -> WorkerEvent:
        """Wait for the next event of this kind and forget it."""
        async with asyncio.timeout(BOUND_S), self.news:
            await self.news.wait_for(lambda: any(isinstance(event, kind) for event in self.events))
        event = next(event for event in self.events if isinstance(event, kind))
        self.events.remove(event)
        return event

    @property
    def error_file(self) -> str:
        return self.environment["TORCHELASTIC_ERROR_FILE"]


@contextlib.asynccontextmanager
async def seat() -> AsyncIterator[Seat]:
    """Serve one worker; leaves nothing behind."""
    folder = tempfile.mkdtemp(dir="/tmp", prefix="er-")
    events: list[WorkerEvent] = []
    news = asyncio.Condition()
    notifications: set[asyncio.Task[None]] = set()

    async def notify() -> None:
        async with news:
            news.notify_all()

    def on_event(event: WorkerEvent) -> None:
        events.append(event)
        task = asyncio.ensure_future(notify())
        notifications.add(task)
        task.add_done_callback(notifications.discard)

    def admit(hello: WorkerHello) -> ViewNumber:
        return VIEW

    server = WorkerServer(f"{folder}/agent.sock", admit, on_event)
    await server.start()
    telemetry.create(f"{folder}/telemetry", 0, 1, VIEW)
    file = TelemetryFile(f"{folder}/telemetry")

    async def live() -> None:
        while True:
            if not made.silent:
                file.beat()
            await asyncio.sleep(BEAT_S)

    made = Seat(
        folder=folder,
        server=server,
        telemetry=file,
        events=events,
        news=news,
        environment={
            "ELASTIC_RUN_AGENT_SOCKET": f"{folder}/agent.sock",
            "ELASTIC_RUN_WORKER": WORKER,
            "ELASTIC_RUN_TELEMETRY": f"{folder}/telemetry",
            "ELASTIC_RUN_VIEW": str(VIEW),
            "ELASTIC_RUN_AGENT_PID": str(os.getpid()),
            "TORCHELASTIC_ERROR_FILE": f"{folder}/error.json",
        },
    )
    living = asyncio.create_task(live())
    try:
        yield made
    finally:
        living.cancel()
        await asyncio.gather(living, return_exceptions=True)
        await server.close()
        file.close()
        shutil.rmtree(folder)


async def start(
    words: Sequence[str], cwd: str, environment: dict[str, str] | None = None, options: Sequence[str] = ("-u",)
) -> asyncio.subprocess.Process:
    """Start `python OPTIONS WORDS`; prepend BOOTSTRAP to the words for a worker."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *options,
        *words,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def finish(process: asyncio.subprocess.Process) -> Ended:
    """Wait for a process with a bound; kill it when the bound is reached."""
    try:
        async with asyncio.timeout(BOUND_S):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.communicate()
        raise
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(), err.decode())


async def run(
    words: Sequence[str], cwd: str, environment: dict[str, str] | None = None, options: Sequence[str] = ("-u",)
) -> Ended:
    return await finish(await start(words, cwd, environment, options))
