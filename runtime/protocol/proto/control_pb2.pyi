from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AgentState(_message.Message):
    __slots__ = ("view", "phase", "workers_alive", "step_max", "step_rate_hz")
    VIEW_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    WORKERS_ALIVE_FIELD_NUMBER: _ClassVar[int]
    STEP_MAX_FIELD_NUMBER: _ClassVar[int]
    STEP_RATE_HZ_FIELD_NUMBER: _ClassVar[int]
    view: int
    phase: str
    workers_alive: int
    step_max: int
    step_rate_hz: float
    def __init__(self, view: _Optional[int] = ..., phase: _Optional[str] = ..., workers_alive: _Optional[int] = ..., step_max: _Optional[int] = ..., step_rate_hz: _Optional[float] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("node", "rank", "local_rank", "pid", "exit_code", "signal", "message", "traceback", "age_s")
    NODE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    LOCAL_RANK_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    TRACEBACK_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    node: str
    rank: int
    local_rank: int
    pid: int
    exit_code: int
    signal: int
    message: str
    traceback: str
    age_s: float
    def __init__(self, node: _Optional[str] = ..., rank: _Optional[int] = ..., local_rank: _Optional[int] = ..., pid: _Optional[int] = ..., exit_code: _Optional[int] = ..., signal: _Optional[int] = ..., message: _Optional[str] = ..., traceback: _Optional[str] = ..., age_s: _Optional[float] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol_version", "job_id", "token", "node", "incarnation", "address", "nproc", "node_rank", "nodes_min", "nodes_max", "max_restarts", "state", "master_port", "failures")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NPROC_FIELD_NUMBER: _ClassVar[int]
    NODE_RANK_FIELD_NUMBER: _ClassVar[int]
    NODES_MIN_FIELD_NUMBER: _ClassVar[int]
    NODES_MAX_FIELD_NUMBER: _ClassVar[int]
    MAX_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MASTER_PORT_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    job_id: str
    token: str
    node: str
    incarnation: str
    address: str
    nproc: int
    node_rank: int
    nodes_min: int
    nodes_max: int
    max_restarts: int
    state: AgentState
    master_port: int
    failures: _containers.RepeatedCompositeFieldContainer[Failure]
    def __init__(self, protocol_version: _Optional[int] = ..., job_id: _Optional[str] = ..., token: _Optional[str] = ..., node: _Optional[str] = ..., incarnation: _Optional[str] = ..., address: _Optional[str] = ..., nproc: _Optional[int] = ..., node_rank: _Optional[int] = ..., nodes_min: _Optional[int] = ..., nodes_max: _Optional[int] = ..., max_restarts: _Optional[int] = ..., state: _Optional[_Union[AgentState, _Mapping]] = ..., master_port: _Optional[int] = ..., failures: _Optional[_Iterable[_Union[Failure, _Mapping]]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: AgentState
    def __init__(self, state: _Optional[_Union[AgentState, _Mapping]] = ...) -> None: ...

class Prepared(_message.Message):
    __slots__ = ("view", "master_port")
    VIEW_FIELD_NUMBER: _ClassVar[int]
    MASTER_PORT_FIELD_NUMBER: _ClassVar[int]
    view: int
    master_port: int
    def __init__(self, view: _Optional[int] = ..., master_port: _Optional[int] = ...) -> None: ...

class WorkersFailed(_message.Message):
    __slots__ = ("view", "failures")
    VIEW_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    view: int
    failures: _containers.RepeatedCompositeFieldContainer[Failure]
    def __init__(self, view: _Optional[int] = ..., failures: _Optional[_Iterable[_Union[Failure, _Mapping]]] = ...) -> None: ...

class WorkersFinished(_message.Message):
    __slots__ = ("view",)
    VIEW_FIELD_NUMBER: _ClassVar[int]
    view: int
    def __init__(self, view: _Optional[int] = ...) -> None: ...

class Leaving(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class AgentMessage(_message.Message):
    __slots__ = ("hello", "heartbeat", "prepared", "workers_failed", "workers_finished", "leaving")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    PREPARED_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FAILED_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FINISHED_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    heartbeat: Heartbeat
    prepared: Prepared
    workers_failed: WorkersFailed
    workers_finished: WorkersFinished
    leaving: Leaving
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., prepared: _Optional[_Union[Prepared, _Mapping]] = ..., workers_failed: _Optional[_Union[WorkersFailed, _Mapping]] = ..., workers_finished: _Optional[_Union[WorkersFinished, _Mapping]] = ..., leaving: _Optional[_Union[Leaving, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("message", "current_view")
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CURRENT_VIEW_FIELD_NUMBER: _ClassVar[int]
    message: str
    current_view: int
    def __init__(self, message: _Optional[str] = ..., current_view: _Optional[int] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Prepare(_message.Message):
    __slots__ = ("view", "reason", "stop_at_step")
    VIEW_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_AT_STEP_FIELD_NUMBER: _ClassVar[int]
    view: int
    reason: str
    stop_at_step: int
    def __init__(self, view: _Optional[int] = ..., reason: _Optional[str] = ..., stop_at_step: _Optional[int] = ...) -> None: ...

class Install(_message.Message):
    __slots__ = ("view", "reason", "group_rank", "group_world_size", "first_rank", "world_size", "master_addr", "master_port", "restart_count")
    VIEW_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    GROUP_RANK_FIELD_NUMBER: _ClassVar[int]
    GROUP_WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    FIRST_RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    MASTER_ADDR_FIELD_NUMBER: _ClassVar[int]
    MASTER_PORT_FIELD_NUMBER: _ClassVar[int]
    RESTART_COUNT_FIELD_NUMBER: _ClassVar[int]
    view: int
    reason: str
    group_rank: int
    group_world_size: int
    first_rank: int
    world_size: int
    master_addr: str
    master_port: int
    restart_count: int
    def __init__(self, view: _Optional[int] = ..., reason: _Optional[str] = ..., group_rank: _Optional[int] = ..., group_world_size: _Optional[int] = ..., first_rank: _Optional[int] = ..., world_size: _Optional[int] = ..., master_addr: _Optional[str] = ..., master_port: _Optional[int] = ..., restart_count: _Optional[int] = ...) -> None: ...

class JobEnded(_message.Message):
    __slots__ = ("succeeded", "message")
    SUCCEEDED_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    succeeded: bool
    message: str
    def __init__(self, succeeded: bool = ..., message: _Optional[str] = ...) -> None: ...

class ControllerMessage(_message.Message):
    __slots__ = ("welcome", "refused", "prepare", "install", "job_ended")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    PREPARE_FIELD_NUMBER: _ClassVar[int]
    INSTALL_FIELD_NUMBER: _ClassVar[int]
    JOB_ENDED_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    refused: Refused
    prepare: Prepare
    install: Install
    job_ended: JobEnded
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., prepare: _Optional[_Union[Prepare, _Mapping]] = ..., install: _Optional[_Union[Install, _Mapping]] = ..., job_ended: _Optional[_Union[JobEnded, _Mapping]] = ...) -> None: ...

class NodeReport(_message.Message):
    __slots__ = ("node", "incarnation", "address", "nproc", "condition", "reason", "in_view", "state")
    NODE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NPROC_FIELD_NUMBER: _ClassVar[int]
    CONDITION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    IN_VIEW_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    node: str
    incarnation: str
    address: str
    nproc: int
    condition: str
    reason: str
    in_view: bool
    state: AgentState
    def __init__(self, node: _Optional[str] = ..., incarnation: _Optional[str] = ..., address: _Optional[str] = ..., nproc: _Optional[int] = ..., condition: _Optional[str] = ..., reason: _Optional[str] = ..., in_view: bool = ..., state: _Optional[_Union[AgentState, _Mapping]] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReport(_message.Message):
    __slots__ = ("job_id", "leader", "fencing_token", "condition", "reason", "nodes_min", "nodes_max", "view", "world_size", "restarts_used", "max_restarts", "step", "step_rate_hz", "last_event", "nodes")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    LEADER_FIELD_NUMBER: _ClassVar[int]
    FENCING_TOKEN_FIELD_NUMBER: _ClassVar[int]
    CONDITION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    NODES_MIN_FIELD_NUMBER: _ClassVar[int]
    NODES_MAX_FIELD_NUMBER: _ClassVar[int]
    VIEW_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_USED_FIELD_NUMBER: _ClassVar[int]
    MAX_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEP_RATE_HZ_FIELD_NUMBER: _ClassVar[int]
    LAST_EVENT_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    leader: str
    fencing_token: int
    condition: str
    reason: str
    nodes_min: int
    nodes_max: int
    view: int
    world_size: int
    restarts_used: int
    max_restarts: int
    step: int
    step_rate_hz: float
    last_event: str
    nodes: _containers.RepeatedCompositeFieldContainer[NodeReport]
    def __init__(self, job_id: _Optional[str] = ..., leader: _Optional[str] = ..., fencing_token: _Optional[int] = ..., condition: _Optional[str] = ..., reason: _Optional[str] = ..., nodes_min: _Optional[int] = ..., nodes_max: _Optional[int] = ..., view: _Optional[int] = ..., world_size: _Optional[int] = ..., restarts_used: _Optional[int] = ..., max_restarts: _Optional[int] = ..., step: _Optional[int] = ..., step_rate_hz: _Optional[float] = ..., last_event: _Optional[str] = ..., nodes: _Optional[_Iterable[_Union[NodeReport, _Mapping]]] = ...) -> None: ...
