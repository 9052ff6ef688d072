"""Outputs of the agent core, in the imperative. The driver executes a list in order."""

from dataclasses import dataclass

from elastic_run.runtime.protocol.ids import ViewNumber
from elastic_run.runtime.protocol.messages import AgentMessage, Failure, Install


@dataclass(frozen=True, slots=True, kw_only=True)
class Tell:
    """Send to the controller; dropped while there is none, the next hello carries the state."""

    message: AgentMessage


@dataclass(frozen=True, slots=True, kw_only=True)
class Announce:
    """A line for the person at the terminal."""

    line: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReservePort:
    """Answered by PortReserved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskToPark:
    """Let workers park after this step. Answered by WorkersParked, or by nothing."""

    view: ViewNumber
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StopWorkers:
    """Signal every worker, kill what is left after `term_s`. Answered by WorkersStopped. Asked again: hurry."""

    signal: int
    term_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StartWorkers:
    """Start this node's workers of a view; each end is answered by WorkerExited, also one that never began."""

    install: Install


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowFailures:
    failures: tuple[Failure, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """Nothing of this node's runs any more: end the agent."""

    code: int


Action = Tell | Announce | ReservePort | AskToPark | StopWorkers | StartWorkers | ShowFailures | Exit
