"""A numbered membership of the job, and where each logical rank lives in it.

Invariants:
1. Members are ordered by group rank; logical ranks are dealt out in that order, without gap
   (tests/unit/test_view.py).
2. A view of 10,000 workers fits one etcd value (tests/unit/test_view.py).
Not here: who becomes a member (controller/quorum.py, controller/suspicion.py).
"""

import enum
from dataclasses import dataclass
from typing import NamedTuple

from elastic_run.runtime.protocol.ids import Incarnation, LogicalRank, NodeId, ViewNumber


class ViewStatus(enum.StrEnum):
    """How far a view change has come. It only moves forward; a fault on the way ends it as ABANDONED."""

    PROPOSED = "proposed"  # members are asked to reach their safe point
    PREPARED = "prepared"  # every member acknowledged
    INSTALLED = "installed"  # workers run in it
    ABANDONED = "abandoned"  # overtaken by a higher number before it was installed


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One node of a view."""

    node: NodeId
    incarnation: Incarnation
    address: str
    nproc: int

    def __post_init__(self) -> None:
        if self.nproc < 1:
            raise ValueError(f"member {self.node} brings {self.nproc} workers; at least 1 is needed")


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Record of one view, as stored under `views/<number>`."""

    number: ViewNumber
    status: ViewStatus
    members: tuple[Member, ...]
    restart_count: int
    """Worker failures charged so far: TORCHELASTIC_RESTART_COUNT."""
    reason: str
    """Why this view was proposed: a sentence with numbers."""
    proposed_at: float
    """Unix seconds, for people only; no decision reads it."""
    stop_at_step: int | None = None
    """Planned changes: the step after which workers park. None: stop at once."""
    master_addr: str | None = None
    master_port: int | None = None

    def __post_init__(self) -> None:
        if self.number < 1 or self.restart_count < 0:
            raise ValueError(f"view {self.number} with restart count {self.restart_count} is impossible")
        if len({member.node for member in self.members}) != len(self.members):
            raise ValueError(f"view {self.number} names a node twice")

    @property
    def world_size(self) -> int:
        return sum(member.nproc for member in self.members)

    def member(self, node: NodeId) -> Member | None:
        return next((member for member in self.members if member.node == node), None)

    def holds(self, node: NodeId, incarnation: Incarnation) -> bool:
        member = self.member(node)
        return member is not None and member.incarnation == incarnation


class Hosting(NamedTuple):
    """Where a logical rank lives."""

    group_rank: int
    local_rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Logical rank -> worker. Here every worker hosts one logical rank; later placements host several."""

    first_ranks: tuple[int, ...]
    """First logical rank of each member, by group rank."""
    world_size: int

    @staticmethod
    def of(view: View) -> "Placement":
        first_ranks, rank = [], 0
        for member in view.members:
            first_ranks.append(rank)
            rank += member.nproc
        return Placement(first_ranks=tuple(first_ranks), world_size=rank)

    def host(self, rank: LogicalRank) -> Hosting:
        """Return where `rank` lives. Raises IndexError outside 0..world_size-1."""
        if not 0 <= rank < self.world_size:
            raise IndexError(f"rank {rank} is outside 0..{self.world_size - 1}")
        group_rank = max(i for i, first in enumerate(self.first_ranks) if first <= rank)
        return Hosting(group_rank, rank - self.first_ranks[group_rank])
