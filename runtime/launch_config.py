"""What a command line asks for: the result of flags.py, still without any answer of this machine.

Invariants:
1. Holds no secret: the store's password is named by its file (read in process_configs.py).
Not here: how it is read (flags.py), checked against this machine (preflight.py), turned into the configurations of
agent and controller (process_configs.py).
"""

import enum
from dataclasses import dataclass

from elastic_run.runtime.affinity import BindingMode
from elastic_run.runtime.protocol.config import CommandConfig, OutputConfig
from elastic_run.runtime.protocol.ids import JobId, NodeId


class StatusMode(enum.StrEnum):
    """When the live status line is drawn."""

    AUTO = "auto"  # on a terminal
    ON = "on"
    OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedStore:
    """An etcd of this job alone: loopback, random ports; nobody else can join."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedStore:
    """An etcd that the node on which `host` is local starts at `host:port`; the others join it there."""

    host: str
    port: int
    is_host: bool | None
    """Whether this node starts it; None: when `host` is an address of this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalStore:
    """An etcd cluster that somebody else runs."""

    endpoints: tuple[str, ...]


StoreChoice = EmbeddedStore | SharedStore | ExternalStore


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreAccess:
    """TLS and user of an etcd."""

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    user: str | None = None
    password_file: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """One resolved command line."""

    store: StoreChoice
    access: StoreAccess
    job_id: JobId
    nodes_min: int
    nodes_max: int
    nproc: int | str
    """Workers of this node, or what to count on this machine: auto, cpu, gpu, xpu or the name of a torch backend."""
    max_restarts: int
    last_call_s: float
    join_timeout_s: float
    node: NodeId | None
    """None: named after this machine."""
    node_rank: int | None
    local_addr: str | None
    role: str
    command: CommandConfig
    output: OutputConfig
    signals: tuple[str, ...]
    shutdown_timeout_s: float
    virtual_local_rank: bool
    numa_binding: BindingMode | None
    with_controller: bool
    run_dir: str | None
    """Where the run directory is made and kept; None: in the default place, and removed at the end."""
    metrics_port: int | None
    status: StatusMode
    notices: tuple[str, ...]
    """Lines to tell the user before the start: what was given and has no effect, and why."""
