"""Supervises one node's part of a job: the store if it is ours, a controller candidate, and the agent.

The agent's end is the job's end. A controller that dies is started again, a few times; so is the store. Signals go to
the agent, which drains; Ctrl-C a second time kills.

Invariants (tests/integration/test_launcher.py):
1. However run() ends, its children and what descends from them are gone: agent first, then controller, then store.
2. The exit code is 0 only when the agent's is; 128+N only when signal N asked for the end.
3. Every wait after a signal is bounded.
Not here: what the children are told (process_configs.py), the command line and its errors (cli.py).
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Container, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from elastic_run.runtime.edge.process import Exit, Process, kill_strays, set_subreaper, spawn
from elastic_run.runtime.edge.tasks import cancel_all
from elastic_run.runtime.protocol.errors import InvariantViolated
from elastic_run.runtime.restart_budget import RestartBudget

T = TypeVar("T")

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_SIGNAL_BASE = 128
CONTROLLER_EXIT_FOREIGN_STORE = 4
"""The controller found records in the store that are not of this program; it said so itself."""
DRAIN_MARGIN_S = 15.0
"""What the agent may take beyond its own time-out for workers before it is killed."""
CONTROLLER_STOP_S = 3.0
"""To give up leadership; a killed leader only delays the next one by its lease."""
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Children:
    """The programs to run, ready to be started."""

    agent: tuple[str, ...]
    controller: tuple[str, ...] | None


class KeptStore(Protocol):
    """A store process of ours that is running (embedded_etcd.py)."""

    async def keep(self) -> None:
        """Start it again whenever it dies; raise StoreUnavailable when that is too often."""

    async def linger(self, own_pids: Container[int | None]) -> None:
        """Return when no other node uses it any more, or after a bounded time."""

    async def stop(self) -> None:
        """End it."""


class Launcher:
    """One run. `assemble` does what has to be done first and returns the children to start."""

    def __init__(
        self,
        *,
        assemble: Callable[[], Awaitable[Children]],
        store: KeptStore | None,
        env: Mapping[str, str],
        say: Callable[[str], None],
        drain_s: float,
        signals: tuple[str, ...] = SIGNALS,
        sole_controller: bool = True,
    ) -> None:
        """`drain_s`: how long the agent may take to end its workers. `sole_controller`: no other node can offer one."""
        self._assemble = assemble
        self._store = store
        self._env = env
        self._say = say
        self._drain_s = drain_s
        self._signals = tuple(dict.fromkeys((*signals, *SIGNALS)))
        self._sole_controller = sole_controller
        self._asked: int | None = None
        self._asked_event = asyncio.Event()
        self._agent: Process | None = None
        self._controller: Process | None = None

    async def run(self) -> int:
        """Run this node's part of the job to its end; return the exit code. Raises ElasticError if it cannot start."""
        set_subreaper()
        with self._signal_handlers():
            try:
                return await self._first_verdict()
            finally:
                await self._end_children()

    async def _first_verdict(self) -> int:
        children = await self._unless_asked(self._assemble())
        if children is None:
            return EXIT_SIGNAL_BASE + (self._asked or 0)
        # Not SIGKILL: should this process be killed, the agent ends its workers and what escaped from them.
        self._agent = spawn(children.agent, env=self._env, death_signal=signal.SIGTERM)
        watchers: list[Coroutine[Any, Any, int | None]] = [self._watch_agent(self._agent), self._obey(self._agent)]
        if children.controller is not None:
            watchers.append(self._keep_controller(children.controller))
        if self._store is not None:
            watchers.append(self._keep_store(self._store))
        tasks = [asyncio.create_task(watcher) for watcher in watchers]
        try:
            for done in asyncio.as_completed(tasks):
                if (verdict := await done) is not None:  # None: this watcher leaves it to the others
                    return verdict
        finally:
            await cancel_all(tasks)
        raise InvariantViolated("the agent ended without a verdict")

    async def _unless_asked(self, work: Awaitable[T]) -> T | None:
        """Return the result of `work`, or None when a signal came first."""
        working, asked = asyncio.ensure_future(work), asyncio.create_task(self._asked_event.wait())
        try:
            await asyncio.wait([working, asked], return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else None
        finally:
            await cancel_all([working, asked])

    async def _watch_agent(self, agent: Process) -> int:
        exit_ = await agent.wait()
        if self._asked is None and exit_.signal is not None:
            self._say(f"the agent of this node {exit_}; its workers are ended with it")
        return verdict_of(exit_, self._asked)

    async def _keep_controller(self, argv: tuple[str, ...]) -> int | None:
        """Run a controller until the job ends; return a verdict when there can be no controller any more."""
        budget = RestartBudget()
        while True:
            self._controller = self._spawn(argv)
            exit_ = await self._controller.wait()
            if exit_.ok:
                return None  # the job is over; the agent says how
            if exit_.code == CONTROLLER_EXIT_FOREIGN_STORE:
                if self._sole_controller:
                    return EXIT_USAGE
                self._say("this node offers no controller any more; its workers go on")
                return None
            pause_s = budget.next_pause_s(asyncio.get_running_loop().time())
            if pause_s is None:
                self._say(f"the controller of this node dies again and again; it last {exit_}")
                return EXIT_FAILED if self._sole_controller else None
            self._say(f"the controller of this node {exit_}; starting it again")
            await asyncio.sleep(pause_s)

    async def _keep_store(self, store: KeptStore) -> None:
        await store.keep()

    async def _obey(self, agent: Process) -> None:
        """Pass the first signal on to the agent, and see that it ends in time."""
        await self._asked_event.wait()
        agent.signal(self._asked or signal.SIGTERM)
        patience_s = self._drain_s + DRAIN_MARGIN_S
        try:
            await asyncio.wait_for(agent.wait(), patience_s)
        except TimeoutError:
            self._say(f"the agent did not end within {patience_s:g} s; killing it")
            agent.signal_group(signal.SIGKILL)

    async def _end_children(self) -> None:
        if self._agent is not None:
            await self._agent.stop(self._drain_s + DRAIN_MARGIN_S)
        if self._store is not None and self._asked is None:
            await self._unless_asked(self._store.linger({child.pid for child in (self._controller,) if child}))
        if self._controller is not None:
            await self._controller.stop(CONTROLLER_STOP_S)
        if self._store is not None:
            await self._store.stop()
        await kill_strays(known=())

    def _spawn(self, argv: tuple[str, ...]) -> Process:
        return spawn(argv, env=self._env, death_signal=signal.SIGKILL)

    @contextmanager
    def _signal_handlers(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = [signal.Signals[name] for name in self._signals]
        handled = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # nohup stays nohup
        for number in handled:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._asked is None:
            self._asked = number
            self._asked_event.set()
            self._say(f"{number.name} received, ending the job" + (" (Ctrl-C again: at once)" if number == 2 else ""))
        elif number == signal.SIGINT:
            self._say("SIGINT again, killing the job")
            for child in (self._agent, self._controller):
                if child is not None:
                    child.signal_group(signal.SIGKILL)


def verdict_of(agent: Exit, asked: int | None) -> int:
    """Return the job's exit code from the agent's end and the signal that asked for it, if any."""
    if agent.code == 0:
        return 0
    if asked is not None:
        return EXIT_SIGNAL_BASE + asked
    return EXIT_FAILED if agent.code is None else agent.code
