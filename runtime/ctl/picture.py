"""What `elastic-ctl` knows of a job: from its leading controller, or, when none answers, from what etcd holds. Pure.

The field names here are those of the JSON output (documents in cli.py) and stay as they are. None: not known from this
source.

Not here: asking (client.py), tables for people (text.py).
"""

from dataclasses import dataclass

from elastic_run.runtime.protocol.messages import NodeReport, StatusReport
from elastic_run.runtime.protocol.records import JobRecords, NodeRecord
from elastic_run.runtime.protocol.view import View, ViewStatus

FROM_LEADER = "leader"
FROM_STORE = "store"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePicture:
    """One node. `condition`: alive, suspect or dead; from the store: leased, or no lease (a member that is gone)."""

    node: str
    incarnation: str
    address: str
    nproc: int
    condition: str
    reason: str
    in_view: bool
    view: int | None
    phase: str | None
    workers_alive: int | None
    step: int | None
    step_rate_hz: float | None
    metrics_port: int | None
    """Of the agent, on loopback of the node; None: off, or not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPicture:
    """One job. `source` is leader or store; `problem` says why the leader did not answer."""

    job_id: str
    source: str
    problem: str | None
    leader: str | None
    leader_metrics_port: int | None
    """Of the leading controller, on loopback of its machine; None: off, or not known."""
    fencing_token: int | None
    condition: str
    """forming, changing, running, succeeded, failed; unknown when only the store answers and the job has not ended."""
    reason: str
    nodes_min: int | None
    nodes_max: int | None
    view: int
    world_size: int
    restarts_used: int
    max_restarts: int | None
    step: int | None
    step_rate_hz: float | None
    last_event: str
    nodes: tuple[NodePicture, ...]


def from_report(report: StatusReport, records: JobRecords) -> JobPicture:
    """What the leader tells; where metrics are is told by the store alone."""
    ports = {record.incarnation: record.metrics_port for record in records.nodes}
    leads = records.leader is not None and records.leader.candidate == report.leader
    return JobPicture(
        job_id=report.job_id,
        source=FROM_LEADER,
        problem=None,
        leader=report.leader,
        leader_metrics_port=records.leader.metrics_port if records.leader and leads else None,
        fencing_token=report.fencing_token,
        condition=report.condition,
        reason=report.reason,
        nodes_min=report.nodes_min,
        nodes_max=report.nodes_max,
        view=report.view,
        world_size=report.world_size,
        restarts_used=report.restarts_used,
        max_restarts=report.max_restarts,
        step=report.step,
        step_rate_hz=report.step_rate_hz,
        last_event=report.last_event,
        nodes=tuple(_reported(node, ports.get(node.incarnation)) for node in report.nodes),
    )


def from_records(job_id: str, records: JobRecords, problem: str) -> JobPicture:
    """What the store alone tells; `problem` says why nobody told more."""
    job = records.spec.job if records.spec else None
    view = installed_view(records)
    members = {member.node: member for member in view.members} if view else {}
    leased = {record.node for record in records.nodes}
    gone = [
        NodeRecord(node=m.node, incarnation=m.incarnation, address=m.address, nproc=m.nproc)
        for m in members.values()
        if m.node not in leased
    ]
    nodes = [_stored(n, view, "leased", "its lease stands") for n in records.nodes]
    nodes += [_stored(n, view, "no lease", "its lease ran out or was given back") for n in gone]
    return JobPicture(
        job_id=job_id,
        source=FROM_STORE,
        problem=problem,
        leader=records.leader.candidate if records.leader else None,
        leader_metrics_port=records.leader.metrics_port if records.leader else None,
        fencing_token=None,
        condition=str(records.result.state) if records.result else "unknown",
        reason=records.result.message if records.result else problem,
        nodes_min=job.nodes_min if job else None,
        nodes_max=job.nodes_max if job else None,
        view=view.number if view else 0,
        world_size=view.world_size if view else 0,
        restarts_used=max((v.restart_count for v in records.views), default=0),
        max_restarts=job.max_restarts if job else None,
        step=None,
        step_rate_hz=None,
        last_event=records.events[-1].message if records.events else "",
        nodes=tuple(sorted(nodes, key=lambda node: node.node)),
    )


def installed_view(records: JobRecords) -> View | None:
    """The newest view that was installed."""
    return next((v for v in reversed(records.views) if v.status is ViewStatus.INSTALLED), None)


def _reported(node: NodeReport, metrics_port: int | None) -> NodePicture:
    return NodePicture(
        node=node.node,
        incarnation=node.incarnation,
        address=node.address,
        nproc=node.nproc,
        condition=node.condition,
        reason=node.reason,
        in_view=node.in_view,
        view=node.state.view,
        phase=str(node.state.phase),
        workers_alive=node.state.workers_alive,
        step=node.state.step_max,
        step_rate_hz=node.state.step_rate_hz,
        metrics_port=metrics_port,
    )


def _stored(record: NodeRecord, view: View | None, condition: str, reason: str) -> NodePicture:
    return NodePicture(
        node=record.node,
        incarnation=record.incarnation,
        address=record.address,
        nproc=record.nproc,
        condition=condition,
        reason=reason,
        in_view=view is not None and view.holds(record.node, record.incarnation),
        view=None,
        phase=None,
        workers_alive=None,
        step=None,
        step_rate_hz=None,
        metrics_port=record.metrics_port,
    )
