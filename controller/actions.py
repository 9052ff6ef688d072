"""Outputs of the controller core: what is to be done, in the imperative.

The driver executes a list strictly in order: nothing after a Persist happens before it is durable.
"""

from dataclasses import dataclass

from elastic_run.runtime.protocol.messages import ControllerMessage
from elastic_run.runtime.protocol.records import CurrentView, EventRecord, JobResult, JobSpec
from elastic_run.runtime.protocol.view import View


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    key: str
    record: JobSpec | View | CurrentView | EventRecord | JobResult
    create: bool = False
    """The key must not exist yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Persist:
    """Write all of it in one transaction under the leader's fence."""

    puts: tuple[Put, ...]
    deletes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    connection: int
    message: ControllerMessage


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseConnection:
    connection: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EndJob:
    """The result is durable and every connected agent was told: the controller may go."""

    result: JobResult


Action = Persist | Send | CloseConnection | EndJob
