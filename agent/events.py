"""Inputs of the agent core: what happened, in the past tense. `now`: the node's monotonic clock, read by the driver."""

from dataclasses import dataclass

from elastic_run.runtime.protocol.ids import ViewNumber
from elastic_run.runtime.protocol.messages import ControllerMessage, Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    now: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerSpoke(Event):
    message: ControllerMessage


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerLost(Event):
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CurrentViewSeen(Event):
    """etcd says which view is the newest installed one."""

    number: ViewNumber


@dataclass(frozen=True, slots=True, kw_only=True)
class PortReserved(Event):
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerExited(Event):
    view: ViewNumber
    local_rank: int
    failure: Failure | None
    """None: it ended with code 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersParked(Event):
    """Every living worker waits at the asked safe point."""

    view: ViewNumber


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersStopped(Event):
    """No worker, nor anything it started, is left."""

    starts: int
    """How many times workers had been started when it was asked for: an answer to an older question is void."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalReceived(Event):
    signal: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticked(Event):
    step_max: int
    step_rate_hz: float


AgentEvent = (
    ControllerSpoke
    | ControllerLost
    | CurrentViewSeen
    | PortReserved
    | WorkerExited
    | WorkersParked
    | WorkersStopped
    | SignalReceived
    | Ticked
)
