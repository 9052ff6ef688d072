"""The status report: the leader's picture of the job for elastic-ctl, the live status line and the metrics."""

from elastic_run.controller.core import ControllerCore
from elastic_run.runtime.protocol.ids import ViewNumber
from elastic_run.runtime.protocol.messages import StatusReport


def report(core: ControllerCore) -> StatusReport:
    """Return a report; steps and rates are those of the installed view's members."""
    view = core.view
    inside = {(member.node, member.incarnation) for member in view.members} if view else set()
    nodes = tuple(node.report(in_view=(node.node, node.incarnation) in inside) for node in core.roster)
    states = [node.state for node in nodes if node.in_view]
    condition, reason = _condition(core)
    return StatusReport(
        job_id=core.job.job_id,
        leader=core.candidate,
        fencing_token=core.token,
        condition=condition,
        reason=reason,
        nodes_min=core.job.nodes_min,
        nodes_max=core.job.nodes_max,
        view=view.number if view else ViewNumber(0),
        world_size=view.world_size if view else 0,
        restarts_used=core.restarts_used,
        max_restarts=core.job.max_restarts,
        step=max((state.step_max for state in states), default=0),
        step_rate_hz=max((state.step_rate_hz for state in states), default=0.0),
        last_event=core.journal.last,
        nodes=nodes,
    )


def _condition(core: ControllerCore) -> tuple[str, str]:
    if core.result is not None:
        return str(core.result.state), core.result.message
    if core.change is not None:
        return "changing", core.waiting_for or core.change.view.reason
    if core.view is None or core.waiting_for:
        return "forming", core.waiting_for
    return "running", core.view.reason
