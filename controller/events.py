"""Inputs of the controller core: what happened, in the past tense.

Every event carries `now` (monotonic seconds) and `wall` (unix seconds, for records people read), both read once by the
driver, and `cause`, the id under which logs tie decisions to what triggered them.
"""

from dataclasses import dataclass

from elastic_run.runtime.protocol.ids import FencingToken, Incarnation, NodeId
from elastic_run.runtime.protocol.messages import AgentMessage, Hello
from elastic_run.runtime.protocol.records import JobRecords, JobSpec, NodeRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    now: float
    wall: float
    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConnected(Event):
    connection: int
    hello: Hello


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSpoke(Event):
    connection: int
    message: AgentMessage


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentDisconnected(Event):
    connection: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLeaseSeen(Event):
    record: NodeRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLeaseGone(Event):
    node: NodeId
    incarnation: Incarnation


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticked(Event):
    pass


ControllerEvent = AgentConnected | AgentSpoke | AgentDisconnected | NodeLeaseSeen | NodeLeaseGone | Ticked


@dataclass(frozen=True, slots=True, kw_only=True)
class TermBegan:
    """What a core is made of: the leader's key was won, and this is what etcd held then."""

    now: float
    token: FencingToken
    candidate: str
    records: JobRecords
    fresh_spec: JobSpec
    """Written when the records hold no spec yet."""
