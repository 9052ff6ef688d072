"""Decides whether an agent may be part of the job.

Invariant: a refusal is one sentence that says what to change (tests/unit/test_admission.py).
"""

from elastic_run.controller.roster import Roster
from elastic_run.controller.suspicion import Condition
from elastic_run.runtime.protocol.errors import UserError
from elastic_run.runtime.protocol.ids import PROTOCOL_VERSION, check_name
from elastic_run.runtime.protocol.messages import Hello
from elastic_run.runtime.protocol.records import JobSpec
from elastic_run.runtime.protocol.view import View


def why_refuse(hello: Hello, spec: JobSpec, roster: Roster, view: View | None, *, changing: bool) -> str:
    """Return why the agent is refused; empty when it is welcome."""
    job = spec.job
    if hello.protocol_version != PROTOCOL_VERSION:
        return f"the agent speaks protocol version {hello.protocol_version}, the controller {PROTOCOL_VERSION}"
    if hello.job_id != job.job_id or hello.token != spec.token:
        return f"it does not belong to job {job.job_id}: wrong job id or join token"
    try:
        check_name(hello.node, what="node name")
    except UserError as error:
        return str(error)
    if hello.nproc < 1:
        return f"it brings {hello.nproc} workers; at least 1 is needed"
    if (hello.nodes_min, hello.nodes_max) != (job.nodes_min, job.nodes_max):
        return (
            f"it asks for --nnodes={hello.nodes_min}:{hello.nodes_max}, but job {job.job_id} runs with "
            f"--nnodes={job.nodes_min}:{job.nodes_max}: use the same, or another --rdzv-id"
        )
    if hello.max_restarts != job.max_restarts:
        return (
            f"it asks for --max-restarts={hello.max_restarts}, but job {job.job_id} runs with "
            f"--max-restarts={job.max_restarts}: use the same, or another --rdzv-id"
        )
    known = roster.get(hello.node)
    if known is not None and known.incarnation != hello.incarnation and known.condition is Condition.ALIVE:
        return f"a node named {hello.node} is already there and alive: give this one another --node-name"
    return _why_full(hello, spec, roster, view, changing=changing)


def _why_full(hello: Hello, spec: JobSpec, roster: Roster, view: View | None, *, changing: bool) -> str:
    """A job of fixed size that is complete and healthy takes nobody; an elastic one lets spares wait."""
    job = spec.job
    if job.nodes_min != job.nodes_max or view is None or changing or view.holds(hello.node, hello.incarnation):
        return ""
    members = [roster.holder(member) for member in view.members]
    if len(members) < job.nodes_max or any(m is None or m.condition is not Condition.ALIVE for m in members):
        return ""
    return (
        f"job {job.job_id} is complete with {len(members)} of {job.nodes_max} nodes: use another --rdzv-id, "
        "or start the job with --nnodes=MIN:MAX to let spares wait"
    )
