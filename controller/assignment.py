"""What each member of an installed view is told: its group rank, its ranks, where the master is.

Invariant: the first ranks follow the placement, and every member is told the same world (tests/unit/test_change.py).
"""

from elastic_run.runtime.protocol.errors import InvariantViolated
from elastic_run.runtime.protocol.ids import NodeId
from elastic_run.runtime.protocol.messages import Install
from elastic_run.runtime.protocol.view import Placement, View


def installs(view: View) -> dict[NodeId, Install]:
    """Return every member's message; linear in the number of members."""
    if view.master_addr is None or view.master_port is None:
        raise InvariantViolated(f"view {view.number} is installed without a master")
    placement = Placement.of(view)
    return {
        member.node: Install(
            view=view.number,
            reason=view.reason,
            group_rank=group_rank,
            group_world_size=len(view.members),
            first_rank=placement.first_ranks[group_rank],
            world_size=placement.world_size,
            master_addr=view.master_addr,
            master_port=view.master_port,
            restart_count=view.restart_count,
        )
        for group_rank, member in enumerate(view.members)
    }
