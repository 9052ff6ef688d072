"""How the members of a view stand, by what the roster knows: lost, suspect, finished, how far, and who could join them.

Pure questions; linear in the number of nodes.
Invariants (tests/unit/test_controller_*.py):
1. A member stands while it is the same incarnation and nothing it says contradicts that its workers are of this view:
   one that stopped for a later view, or fenced itself off, does not.
2. A boundary is made only of steps counted in the very view it is asked for.
Not here: is a node alive (suspicion.py), what follows (core.py).
"""

import math

from elastic_run.controller import suspicion
from elastic_run.controller.roster import Roster
from elastic_run.controller.suspicion import Condition
from elastic_run.runtime.protocol.ids import NodeId
from elastic_run.runtime.protocol.messages import AgentPhase
from elastic_run.runtime.protocol.view import Member, View

SAFE_POINT_AHEAD_S = 1.5
"""How far ahead of the newest heard step workers park: one heartbeat, one transaction, one message."""
STEPS_AHEAD_MIN = 2


def lost(roster: Roster, view: View) -> list[NodeId]:
    return [member.node for member in view.members if not _stands(roster, member, view)]


def _stands(roster: Roster, member: Member, view: View) -> bool:
    node = roster.holder(member)
    if node is None or node.connection is None:
        return node is not None
    return node.state.view == view.number and node.state.phase not in (AgentPhase.IDLE, AgentPhase.PREPARING)


def any_suspect(roster: Roster, view: View) -> bool:
    holders = map(roster.holder, view.members)
    return any(node is None or node.condition is not Condition.ALIVE for node in holders)


def any_may_return(roster: Roster, view: View, now: float) -> bool:
    """A survivor whose stream just broke is given its grace, so that one view change serves."""
    return any(
        node is not None and node.broken_at is not None and now - node.broken_at < suspicion.grace_s(node.adopted)
        for node in map(roster.holder, view.members)
    )


def finished(roster: Roster, member: Member, view: View) -> bool:
    node = roster.holder(member)
    return node is not None and node.finished_view == view.number


def joiners(roster: Roster, view: View, nodes_max: int) -> list[NodeId]:
    """Return the nodes that could be told to join the view, as many as there are places, by arrival."""
    free = nodes_max - len(view.members)
    if free <= 0:
        return []
    inside = {member.node for member in view.members}
    return [node.node for node in roster if node.available and node.node not in inside][:free]


def boundary(roster: Roster, view: View) -> int | None:
    """Return the step after which all workers park; None when no steps are counted (yet)."""
    holders = map(roster.holder, view.members)
    states = [node.state for node in holders if node is not None and node.runs(view.number)]
    newest = max((state.step_max for state in states), default=0)
    ahead = math.ceil(max((state.step_rate_hz for state in states), default=0.0) * SAFE_POINT_AHEAD_S)
    return newest + STEPS_AHEAD_MIN + ahead if newest else None
