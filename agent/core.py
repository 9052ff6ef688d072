"""The agent's decisions: what this node's workers do, and what the controller is told.

handle(event) -> actions; no await, clock, I/O or randomness.

Invariants (validate(), tests/unit/test_agent_core.py, tests/simulation):
1. Workers run in one view at a time, started only by the Install of the very view this node acknowledged.
2. A view is acknowledged only when nothing of an older one runs any more.
3. Losing the controller or etcd stops nothing. A newer installed view without this node stops its workers (fencing).
4. Every message may arrive twice; an older one changes nothing.
5. The agent exits only when nothing of its workers is left.
Not here: the rules of membership (controller/core.py), processes (workers.py), sockets and clocks (driver.py).
"""

import dataclasses
import enum
import signal as signals
from typing import assert_never

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
from elastic_run.agent.events import (
    AgentEvent,
    ControllerLost,
    ControllerSpoke,
    CurrentViewSeen,
    PortReserved,
    SignalReceived,
    Ticked,
    WorkerExited,
    WorkersParked,
    WorkersStopped,
)
from elastic_run.runtime.protocol.config import AgentConfig
from elastic_run.runtime.protocol.errors import InvariantViolated
from elastic_run.runtime.protocol.ids import ViewNumber
from elastic_run.runtime.protocol.messages import (
    AgentPhase,
    AgentState,
    Failure,
    Heartbeat,
    Install,
    JobEnded,
    Leaving,
    Prepare,
    Prepared,
    Refused,
    Welcome,
    WorkersFailed,
    WorkersFinished,
)

SAFE_POINT_TIMEOUT_S = 10.0
"""A planned change waits this long for workers to park; then they are stopped where they are. Above the slowest step
that is common on CPU; a script whose steps are longer loses the politeness, not its state."""
FAREWELL_TIMEOUT_S = 300.0
"""Finished workers wait this long for the controller's word, as long as torchrun's exit barrier."""
GREETING_AFTER_S = 1.0
"""A wait shorter than this is not worth a line."""
NO_VIEW = ViewNumber(0)

EXIT_OK, EXIT_FAILED, EXIT_REFUSED, EXIT_BY_SIGNAL = 0, 1, 2, 128


class Aim(enum.StrEnum):
    """What follows once the workers are gone."""

    NOTHING = "nothing"
    PREPARE = "prepare"
    WAIT = "wait"  # fenced off: this node waits to be taken in again
    EXIT = "exit"


class AgentCore:
    def __init__(self, config: AgentConfig, now: float) -> None:
        self.config = config
        self.phase = AgentPhase.IDLE
        #: the view the phase belongs to
        self.view = NO_VIEW
        #: newest installed view anyone told of
        self.current_view = NO_VIEW
        self.aim = Aim.NOTHING
        #: something of the workers may still run
        self.busy = False
        #: how many times workers were started
        self.starts = 0
        self.master_port: int | None = None
        #: failures of this view, and when they were heard of
        self.failures: tuple[Failure, ...] = ()
        self._failed_at: tuple[float, ...] = ()
        self.alive = 0
        self.exit_code: int | None = None
        self.connected = False
        self._now = self._since = now
        #: while workers are on their way to a safe point: until when, and for which view they were asked
        self._park_until: float | None = None
        self._park_view = NO_VIEW
        self._steps = (0, 0.0)
        #: what the controller says this node waits for, until it is passed on
        self._greeting = ""
        self._last_word = ""
        self._greeted_at = now
        #: why this node leaves of its own accord
        self._farewell = ""
        self._out: list[Action] = []

    @property
    def state(self) -> AgentState:
        return AgentState(
            view=self.view,
            phase=self.phase,
            workers_alive=self.alive,
            step_max=self._steps[0],
            step_rate_hz=self._steps[1],
        )

    def aged_failures(self, now: float) -> tuple[Failure, ...]:
        """Return the failures with ages as of `now`, for a controller that has not seen them."""
        pairs = zip(self.failures, self._failed_at, strict=True)
        return tuple(dataclasses.replace(f, age_s=f.age_s + now - at) for f, at in pairs)

    def handle(self, event: AgentEvent) -> list[Action]:
        self._now = event.now
        match event:
            case ControllerSpoke():
                self._heard(event)
            case ControllerLost():
                self._lost_controller(event.reason)
            case CurrentViewSeen():
                self._fence(event.number)
            case PortReserved():
                self.master_port = event.port
                self._acknowledge()
            case WorkerExited():
                self._exited(event)
            case WorkersParked():
                if self._park_until is not None and event.view == self._park_view:
                    self._stop(self.config.restart_timeout_s)
            case WorkersStopped():
                if event.starts == self.starts:
                    self._stopped()
            case SignalReceived():
                self._signalled(event.signal)
            case Ticked():
                self._tick(event)
            case _:
                assert_never(event)
        actions, self._out = self._out, []
        return actions

    # Messages

    def _heard(self, event: ControllerSpoke) -> None:
        if self.aim is Aim.EXIT:
            if self._farewell and isinstance(event.message, Welcome):  # it may have missed the first one
                self._out.append(Tell(message=Leaving(reason=self._farewell)))
            return
        match event.message:
            case Welcome(message=message, current_view=current):
                self.connected, self._greeting, self._last_word, self._greeted_at = True, message, message, self._now
                self._fence(current)
            case Refused(reason=reason):
                self._say(f"refused: {reason}")
                self._leave(EXIT_REFUSED if self.current_view == NO_VIEW or not self.busy else EXIT_FAILED)
            case Prepare():
                self._prepare(event.message)
            case Install():
                self._install(event.message)
            case JobEnded():
                self._end(event.message)
            case _:
                assert_never(event.message)

    def _prepare(self, prepare: Prepare) -> None:
        if prepare.view < self.view or prepare.view <= self.current_view:
            return
        if prepare.view == self.view and self.phase is AgentPhase.PREPARED:
            self._acknowledge()
            return
        was, self.view = self.phase, prepare.view
        if was is AgentPhase.PREPARED:
            self._acknowledge()
        elif was is AgentPhase.PREPARING and self.aim is Aim.PREPARE:
            if prepare.stop_at_step is None and self._park_until is not None:
                self._stop(self.config.restart_timeout_s)
        else:
            self.aim, self.phase = Aim.PREPARE, AgentPhase.PREPARING
            self.master_port = None
            self._out.append(ReservePort())
            self._begin_stop(prepare, running=was is AgentPhase.RUNNING)

    def _begin_stop(self, prepare: Prepare, *, running: bool) -> None:
        if self.busy and self._park_until is None:
            self._say(f"view {prepare.view} is coming, workers stop: {prepare.reason}")
        if running and self.busy and prepare.stop_at_step is not None:
            self._park_until, self._park_view = self._now + SAFE_POINT_TIMEOUT_S, prepare.view
            self._out.append(AskToPark(view=prepare.view, step=prepare.stop_at_step))
        elif self.busy:
            self._stop(self.config.restart_timeout_s)

    def _acknowledge(self) -> None:
        """Say that the view may come, once nothing runs and a port is held."""
        if self.aim is Aim.PREPARE and not self.busy and self.master_port is not None:
            self.phase = AgentPhase.PREPARED
            self._out.append(Tell(message=Prepared(view=self.view, master_port=self.master_port)))

    def _install(self, install: Install) -> None:
        if self.phase is not AgentPhase.PREPARED or install.view != self.view:
            return
        self.phase, self.aim, self.current_view = AgentPhase.RUNNING, Aim.NOTHING, install.view
        self.busy, self.alive, self._steps = True, self.config.nproc, (0, 0.0)
        self.failures, self._failed_at = (), ()
        self.starts += 1
        last = install.first_rank + self.config.nproc - 1
        ranks = f"rank {last}" if last == install.first_rank else f"ranks {install.first_rank}-{last}"
        nodes = "1 node" if install.group_world_size == 1 else f"{install.group_world_size} nodes"
        self._say(f"view {install.view}: {nodes}, {install.world_size} workers; this node runs {ranks}")
        self._out.append(StartWorkers(install=install))

    def _end(self, ended: JobEnded) -> None:
        if not ended.succeeded:
            self._say(f"the job has failed: {ended.message}")
            if self.failures:
                self._out.append(ShowFailures(failures=self.failures))
        self._leave(EXIT_OK if ended.succeeded else EXIT_FAILED)

    def _lost_controller(self, reason: str) -> None:
        if self.connected and self.aim is not Aim.EXIT:
            running = self.phase is AgentPhase.RUNNING
            self._say(f"controller lost ({reason})" + ("; training goes on" if running else ""))
        self.connected, self._greeting = False, ""

    def _fence(self, number: ViewNumber) -> None:
        self.current_view = max(self.current_view, number)
        in_older_view = self.view < self.current_view
        if not in_older_view or self.aim in (Aim.EXIT, Aim.WAIT) or self.phase is AgentPhase.IDLE:
            return
        self._say(f"view {self.current_view} was installed without this node: its workers are stopped")
        self.aim, self.phase = Aim.WAIT, AgentPhase.PREPARING
        if self.busy:
            self._stop(self.config.restart_timeout_s)
        else:
            self._stopped()

    # Workers

    def _exited(self, event: WorkerExited) -> None:
        if self._park_until is not None:
            self._ended_unparked(event)
            return
        if event.view != self.view or self.phase not in (AgentPhase.RUNNING, AgentPhase.FAILED):
            return  # it was stopped
        self.alive -= 1
        if event.failure is not None:
            self.phase = AgentPhase.FAILED
            self.failures = (*self.failures, event.failure)
            self._failed_at = (*self._failed_at, self._now)
            self._out.append(Tell(message=WorkersFailed(view=self.view, failures=(event.failure,))))
        elif self.alive == 0 and not self.failures:
            self.phase, self._since = AgentPhase.FINISHED, self._now
            self._out.append(StopWorkers(signal=signals.SIGTERM, term_s=0.0))  # whatever they left behind
            self._out.append(Tell(message=WorkersFinished(view=self.view)))

    def _ended_unparked(self, event: WorkerExited) -> None:
        """A worker that was asked to park came to its end first."""
        self.alive -= 1
        if event.failure is not None:
            self._stop(self.config.restart_timeout_s)  # the others would wait for it in vain
        elif self.alive == 0:
            self._out.append(Tell(message=WorkersFinished(view=event.view)))
            self._stop(0.0)

    def _stop(self, term_s: float, signal: int = signals.SIGTERM) -> None:
        self._park_until = None
        self._out.append(StopWorkers(signal=signal, term_s=term_s))

    def _stopped(self) -> None:
        self.busy, self.alive = False, 0
        match self.aim:
            case Aim.NOTHING:
                pass
            case Aim.PREPARE:
                self._acknowledge()
            case Aim.WAIT:
                self.aim, self.phase, self.view = Aim.NOTHING, AgentPhase.IDLE, NO_VIEW
                self._out.append(Tell(message=Heartbeat(state=self.state)))
            case Aim.EXIT:
                self._exit()

    # The end

    def _leave(self, code: int) -> None:
        """Stop whatever runs, then exit."""
        self.aim, self.exit_code = Aim.EXIT, code
        if self.busy:
            self._stop(self.config.restart_timeout_s)
        else:
            self._exit()

    def _exit(self) -> None:
        if self.exit_code is None:
            raise InvariantViolated("exits without a code")
        self._out.append(Exit(code=self.exit_code))

    def _signalled(self, number: int) -> None:
        name = signals.Signals(number).name
        if self.aim is Aim.EXIT:
            self._say(f"{name} again: workers are killed")
            self._stop(0.0, signals.SIGKILL)
            return
        self._farewell = f"it received {name}"
        self._out.append(Tell(message=Leaving(reason=self._farewell)))
        self.aim, self.exit_code = Aim.EXIT, EXIT_BY_SIGNAL + number
        if self.busy:
            limit_s = self.config.shutdown_timeout_s
            self._say(f"{name}: passed to the workers, which have {limit_s:g} s")
            self._stop(limit_s, number)
        else:
            self._exit()

    def _tick(self, event: Ticked) -> None:
        if self.phase is AgentPhase.RUNNING:
            self._steps = (event.step_max, event.step_rate_hz)
        if self._park_until is not None and self._now >= self._park_until:
            self._say(f"workers did not reach their safe point within {SAFE_POINT_TIMEOUT_S:g} s and are stopped")
            self._stop(self.config.restart_timeout_s)
        if self.phase is AgentPhase.IDLE and self._greeting and self._now - self._greeted_at >= GREETING_AFTER_S:
            self._say(self._greeting)
            self._greeting = ""
        waited_s = self._now - self._since
        if self.aim is not Aim.EXIT and self.phase is AgentPhase.IDLE and self.current_view == NO_VIEW:
            if waited_s >= self.config.job.join_timeout_s:
                self._say(
                    f"the job did not form within {waited_s:.0f} s: {self._last_word or 'no controller was found'}"
                )
                self._leave(EXIT_FAILED)
        elif self.phase is AgentPhase.FINISHED and waited_s >= FAREWELL_TIMEOUT_S and self.aim is not Aim.EXIT:
            self._say(f"this node's workers finished, but no controller took note within {waited_s:.0f} s")
            self._leave(EXIT_OK)
        if self.connected:
            self._out.append(Tell(message=Heartbeat(state=self.state)))

    def _say(self, line: str) -> None:
        self._out.append(Announce(line=line))

    def validate(self) -> None:
        if self.phase is AgentPhase.PREPARED and (self.busy or self.master_port is None):
            raise InvariantViolated("prepared while workers run or without a port")
        if self.phase is AgentPhase.RUNNING and self.view != self.current_view and self.aim is Aim.NOTHING:
            raise InvariantViolated(f"runs in view {self.view} while {self.current_view} is installed")
