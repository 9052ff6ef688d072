"""What lies in etcd under `/elastic/<job>/`, and how it is read back.

    spec                 JobSpec      what every node must agree on; written once
    sync/leader          LeaderRecord lease of the leading controller; its create revision is the fencing token
    sync/current         CurrentView  number of the newest installed view: agents fence themselves by it
    sync/result          JobResult    how the job ended: for agents that no controller can tell
    nodes/<node>         NodeRecord   lease of the node's agent
    views/<number>       View         every view ever proposed
    events/<sequence>    EventRecord  bounded history for people
    writers/<client>     marker of a store client (runtime/edge/etcd_writer.py); the store hides it

Invariants:
1. Anything else under the prefix, or anything that does not decode, is StoreCorrupt naming the key; nothing is
   overwritten (tests/unit/test_records.py).
"""

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from elastic_run.runtime.protocol import codec
from elastic_run.runtime.protocol.config import JobConfig
from elastic_run.runtime.protocol.errors import CodecError, StoreCorrupt
from elastic_run.runtime.protocol.ids import Incarnation, JobId, NodeId, ViewNumber
from elastic_run.runtime.protocol.view import View

COUNTER_DIGITS = 12
EVENTS_MAX = 1000  # entries kept in etcd


class JobState(enum.StrEnum):
    SUCCEEDED = "succeeded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    job: JobConfig
    token: str
    """Join token: an agent must show it to the controller. Whoever may read the job's prefix may join."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderRecord:
    candidate: str
    address: str
    metrics_port: int | None = None
    """On loopback of its machine; None: it serves no metrics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CurrentView:
    number: ViewNumber


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRecord:
    node: NodeId
    incarnation: Incarnation
    address: str
    nproc: int
    metrics_port: int | None = None
    """Of the agent, on loopback of its machine; None: it serves no metrics."""


class EventKind(enum.StrEnum):
    """Every kind of entry in the event log."""

    LEADER_ELECTED = "leader_elected"
    NODE_JOINED = "node_joined"
    NODE_SUSPECTED = "node_suspected"
    NODE_RETURNED = "node_returned"
    NODE_LOST = "node_lost"
    NODE_REFUSED = "node_refused"
    WORKER_FAILED = "worker_failed"
    VIEW_PROPOSED = "view_proposed"
    VIEW_PREPARED = "view_prepared"
    VIEW_INSTALLED = "view_installed"
    JOB_ENDED = "job_ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRecord:
    sequence: int
    at: float
    """Unix seconds, for people only."""
    kind: EventKind
    message: str
    node: str | None = None
    view: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    state: JobState
    message: str
    at: float


SPEC_KEY = "spec"
SYNC_PREFIX = "sync/"
LEADER_KEY = f"{SYNC_PREFIX}leader"
CURRENT_KEY = f"{SYNC_PREFIX}current"
RESULT_KEY = f"{SYNC_PREFIX}result"
NODES_PREFIX = "nodes/"
VIEWS_PREFIX = "views/"
EVENTS_PREFIX = "events/"


def namespace(job_id: JobId) -> str:
    """Return the prefix of all of a job's keys; the store adds it to the names above."""
    return f"/elastic/{job_id}/"


def node_key(node: NodeId) -> str:
    return f"{NODES_PREFIX}{node}"


def view_key(number: ViewNumber) -> str:
    return f"{VIEWS_PREFIX}{number:0{COUNTER_DIGITS}d}"


def event_key(sequence: int) -> str:
    return f"{EVENTS_PREFIX}{sequence:0{COUNTER_DIGITS}d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecords:
    """Everything found under one job's prefix."""

    spec: JobSpec | None = None
    leader: LeaderRecord | None = None
    current: CurrentView | None = None
    result: JobResult | None = None
    nodes: tuple[NodeRecord, ...] = ()
    views: tuple[View, ...] = ()
    events: tuple[EventRecord, ...] = ()


def decode_job(job_id: JobId, items: Iterable[tuple[str, bytes]]) -> JobRecords:
    """Decode a whole listing of a job's keys. Raises StoreCorrupt (naming the key) or VersionMismatch."""
    single: dict[str, Any] = {}
    lists: dict[str, list[Any]] = {folder: [] for folder in _NAMED}
    for key, value in sorted(items):
        where = namespace(job_id) + key
        folder = key.split("/")[0]
        try:
            if key in _SINGLE:
                field, kind = _SINGLE[key]
                single[field] = codec.decode(kind, value, where=where)
            elif folder in lists:
                lists[folder].append(_decode_named(folder, key, value, where))
            else:
                raise CodecError(f"{where}: is not a key of this program")
        except CodecError as error:
            raise StoreCorrupt(
                f"the store holds something foreign or corrupt: {error}. Nothing was changed. "
                "Use another --rdzv-id, or remove it: "
                f"elastic-ctl forget --rdzv-endpoint=etcd://HOST:PORT --rdzv-id={job_id}"
            ) from None
    single.update({folder: tuple(found) for folder, found in lists.items()})
    return JobRecords(**single)


_SINGLE: dict[str, tuple[str, type]] = {
    SPEC_KEY: ("spec", JobSpec),
    LEADER_KEY: ("leader", LeaderRecord),
    CURRENT_KEY: ("current", CurrentView),
    RESULT_KEY: ("result", JobResult),
}
_NAMED: dict[str, tuple[type, Callable[[Any], str]]] = {
    "nodes": (NodeRecord, lambda record: node_key(record.node)),
    "views": (View, lambda record: view_key(record.number)),
    "events": (EventRecord, lambda record: event_key(record.sequence)),
}


def _decode_named(folder: str, key: str, value: bytes, where: str) -> Any:
    """Decode a record that must lie under the key its own name gives."""
    kind, key_of = _NAMED[folder]
    record: Any = codec.decode(kind, value, where=where)
    if key_of(record) != key:
        raise CodecError(f"{where}: holds the record of {key_of(record)}")
    return record
