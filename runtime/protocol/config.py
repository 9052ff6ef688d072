"""Configuration each process of a job is started with, resolved once by `elastic-run` and passed down as a file.

One frozen dataclass per process. The file is a `codec` document of mode 0600 (it may hold the store's password), so
secrets reach neither argv nor the environment. Under each field: unit, why this default, what breaks lower or higher.

Not here: reading flags and environment (runtime/flags.py); writing the file (runtime/edge/files.py).
"""

import enum
from dataclasses import dataclass

from elastic_run.runtime.protocol.ids import JobId, NodeId


class Entrypoint(enum.StrEnum):
    """How the training command is started."""

    SCRIPT = "script"  # python script.py
    MODULE = "module"  # python -m module
    PROGRAM = "program"  # the program itself (--no-python)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """How to reach etcd."""

    endpoints: tuple[str, ...]
    """`host:port` each; one is enough, several survive the loss of any one."""
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    """TLS: a CA switches it on; certificate and key authenticate this client."""
    user: str | None = None
    password: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """What all nodes of a job must agree on; written to etcd as the job's spec by the first leader."""

    job_id: JobId
    nodes_min: int
    nodes_max: int
    max_restarts: int
    """Worker failures (not membership changes) after which the job has failed. torchrun's default is 0."""
    last_call_s: float = 30.0
    """Seconds to wait for more nodes once nodes_min are there; torchrun's `last_call_timeout` default. Lower: starts
    small and then restarts when latecomers join. Higher: idle nodes."""
    join_timeout_s: float = 600.0
    """Seconds a node waits for the job to form before it gives up; torchrun's `join_timeout` default."""

    def __post_init__(self) -> None:
        if not 1 <= self.nodes_min <= self.nodes_max:
            raise ValueError(f"nnodes {self.nodes_min}:{self.nodes_max} is not a range: 1 <= MIN <= MAX")
        if self.max_restarts < 0 or self.last_call_s < 0 or self.join_timeout_s <= 0:
            raise ValueError("max_restarts and last_call_s must not be negative, join_timeout_s must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandConfig:
    """The user's training command."""

    entrypoint: Entrypoint
    target: str
    """Path, module name or program."""
    args: tuple[str, ...]
    python: str
    """Interpreter for SCRIPT and MODULE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputConfig:
    """Where workers' stdout and stderr go, with torchrun's meanings. Ranks are local; stream bits: 1 out, 2 err."""

    log_dir: str | None
    redirects: str
    """torchrun's `--redirects` value as given: "0".."3" or "RANK:BITS,..."."""
    tee: str
    local_ranks_filter: tuple[int, ...] | None
    """Only these local ranks reach the console; None: all."""
    stdout_filters: tuple[str, ...]
    stderr_filters: tuple[str, ...]
    """Lines holding one of these are duplicated to filtered_stdout.log / filtered_stderr.log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """One node's agent."""

    job: JobConfig
    store: StoreConfig
    node: NodeId
    node_rank: int | None
    """Wanted position among the nodes (torchrun's static --node-rank); None: order of joining."""
    address: str
    """Address other nodes reach this one at: MASTER_ADDR when it becomes the first node."""
    nproc: int
    role: str
    command: CommandConfig
    output: OutputConfig
    run_dir: str
    """Private directory (0700) for sockets, telemetry, error files; short, as unix sockets' paths end at 107 bytes."""
    shutdown_timeout_s: float = 30.0
    """Seconds between SIGTERM and SIGKILL when the job is stopped by its user; torchrun's default."""
    restart_timeout_s: float = 5.0
    """Seconds between SIGTERM and SIGKILL of workers that a view change restarts: their step is lost anyway."""
    signals: tuple[str, ...] = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
    monitor_interval_s: float = 0.5
    """Seconds between two heartbeats to the controller. Lower costs idle CPU; higher makes the live status lag."""
    lease_ttl_s: int = 2
    """Lease of the node's key. etcd raises anything below 1.5 election time-outs (2 s by default); a loss is noticed by
    it within 3 s at the latest. Higher: silent losses are noticed later. Lower is not possible."""
    virtual_local_rank: bool = False
    cpus: tuple[tuple[int, ...], ...] = ()
    """CPUs each worker is bound to, by local rank (--numa-binding). Empty: workers run wherever the agent may."""
    metrics_port: int | None = None
    """Loopback port of /metrics and /healthz; 0: any free one; None: off."""

    def __post_init__(self) -> None:
        if self.cpus and len(self.cpus) != self.nproc:
            raise ValueError(f"CPUs are given for {len(self.cpus)} workers, there are {self.nproc}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerConfig:
    """One controller candidate."""

    job: JobConfig
    store: StoreConfig
    candidate: str
    """Unique name of this candidate."""
    host: str
    """Address to listen on and to publish; loopback unless the job spans hosts."""
    port: int
    """0: any free one."""
    run_dir: str
    lease_ttl_s: int = 2
    """Lease of the leader's key: how long a dead leader delays the next one (training does not wait for it)."""
    metrics_port: int | None = None
