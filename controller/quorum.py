"""Decides whether the nodes at hand may form a view now, and which of them.

Invariants (tests/unit/test_quorum.py, tests/property/test_quorum_property.py):
1. Never fewer than nodes_min, never more than nodes_max.
2. A forming job starts at once with nodes_max, else when nodes_min have been there for the last-call time.
3. A job that already ran goes on at once with nodes_min or more: nothing is gained by letting survivors wait.
4. Who was a member stays one before anybody new is taken; asked-for node ranks order the rest, then arrival.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from elastic_run.runtime.protocol.decision import Decision
from elastic_run.runtime.protocol.ids import NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    node: NodeId
    node_rank: int | None
    arrival: int
    member_position: int | None
    """Group rank in the view before, None for a newcomer."""


def may_form(
    *, present: int, nodes_min: int, nodes_max: int, enough_for_s: float | None, last_call_s: float, ran_before: bool
) -> Decision[bool]:
    """Say whether a view may be formed of `present` nodes; `enough_for_s` is how long nodes_min have been present."""
    if present < nodes_min:
        return Decision(False, f"waiting for nodes: {present} of at least {nodes_min} are here")
    if present >= nodes_max:
        return Decision(True, f"{min(present, nodes_max)} of {nodes_max} nodes are here")
    if ran_before:
        return Decision(True, f"{present} of at most {nodes_max} nodes are here, {nodes_min} suffice")
    waited_s = enough_for_s or 0.0
    if waited_s >= last_call_s:
        return Decision(
            True, f"{present} of {nodes_max} nodes are here and the last call of {last_call_s:g} s has passed"
        )
    return Decision(
        False, f"last call: {present} of {nodes_max} nodes are here, starting without more after {last_call_s:g} s"
    )


def choose(candidates: Sequence[Candidate], nodes_max: int) -> tuple[NodeId, ...]:
    """Return the members of the next view by group rank."""
    by_merit = sorted(candidates, key=lambda c: (c.member_position is None, c.member_position or 0, c.arrival))
    taken = by_merit[:nodes_max]
    wanted = [c for c in taken if c.node_rank is not None]
    others = [c for c in taken if c.node_rank is None]
    wanted.sort(key=lambda c: (c.node_rank, c.arrival))
    return tuple(c.node for c in (*wanted, *others))
