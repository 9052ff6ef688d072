"""Messages between agent and controller, and the reports of the status service, as plain dataclasses.

The cores see only these; `wire.py` turns them into the protobuf messages of `proto/control.proto`, which have the same
names and fields (held by tests/unit/test_wire.py). Ages are seconds before the moment of sending: clocks of different
hosts are never compared.
"""

import enum
from dataclasses import dataclass

from elastic_run.runtime.protocol.ids import Incarnation, JobId, NodeId, ViewNumber


class AgentPhase(enum.StrEnum):
    """What a node's workers are doing, as the agent reports it."""

    IDLE = "idle"  # no workers, in no view
    PREPARING = "preparing"  # workers are being stopped for a view change
    PREPARED = "prepared"  # no workers; waits for the view to be installed
    RUNNING = "running"  # workers run
    FAILED = "failed"  # at least one worker failed; the others may still run
    FINISHED = "finished"  # every worker ended with 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentState:
    """A node's own account of itself; sent with Hello and every Heartbeat."""

    view: ViewNumber
    """View the phase belongs to; 0 while IDLE."""
    phase: AgentPhase
    workers_alive: int = 0
    step_max: int = 0
    """Largest optimizer step finished by a local worker, from telemetry."""
    step_rate_hz: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The end of one worker that was not a success."""

    node: NodeId
    rank: int
    local_rank: int
    pid: int
    exit_code: int | None
    signal: int | None
    message: str
    traceback: str
    age_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    protocol_version: int
    job_id: JobId
    token: str
    node: NodeId
    incarnation: Incarnation
    address: str
    nproc: int
    node_rank: int | None
    nodes_min: int
    nodes_max: int
    max_restarts: int
    state: AgentState
    master_port: int | None
    """Port reserved for the view being prepared, when the state says PREPARED."""
    failures: tuple[Failure, ...]
    """Failures of the current view, when the state says FAILED: a new leader has not seen them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    state: AgentState


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    view: ViewNumber
    master_port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersFailed:
    view: ViewNumber
    failures: tuple[Failure, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersFinished:
    view: ViewNumber


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaving:
    reason: str


AgentMessage = Hello | Heartbeat | Prepared | WorkersFailed | WorkersFinished | Leaving


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """The node is known to the leader; `message` says what it waits for, if anything."""

    message: str
    current_view: ViewNumber
    """Newest installed view: workers of an older one are fenced off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """Bring workers to their safe point, stop them, reserve a master port, acknowledge."""

    view: ViewNumber
    reason: str
    stop_at_step: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Install:
    """Start workers in this view. Carries this node's share only, so its size does not grow with the job."""

    view: ViewNumber
    reason: str
    group_rank: int
    group_world_size: int
    first_rank: int
    world_size: int
    master_addr: str
    master_port: int
    restart_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEnded:
    succeeded: bool
    message: str


ControllerMessage = Welcome | Refused | Prepare | Install | JobEnded


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    node: NodeId
    incarnation: Incarnation
    address: str
    nproc: int
    condition: str
    """alive, suspect or dead."""
    reason: str
    in_view: bool
    state: AgentState


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusRequest:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusReport:
    """The leader's picture of the job."""

    job_id: JobId
    leader: str
    fencing_token: int
    condition: str
    """forming, changing, running, succeeded, failed; what it waits for is in `reason`."""
    reason: str
    nodes_min: int
    nodes_max: int
    view: ViewNumber
    world_size: int
    restarts_used: int
    max_restarts: int
    step: int
    step_rate_hz: float
    last_event: str
    nodes: tuple[NodeReport, ...]
