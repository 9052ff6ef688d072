"""What the leader knows of one incarnation of a node."""

from dataclasses import dataclass

from elastic_run.controller.suspicion import Condition
from elastic_run.runtime.protocol.ids import Incarnation, NodeId, ViewNumber
from elastic_run.runtime.protocol.messages import AgentPhase, AgentState, NodeReport
from elastic_run.runtime.protocol.view import Member

NO_VIEW = ViewNumber(0)
UNKNOWN_STATE = AgentState(view=NO_VIEW, phase=AgentPhase.IDLE)


@dataclass(slots=True, kw_only=True)
class Node:
    """Another incarnation of the same name is another object."""

    node: NodeId
    incarnation: Incarnation
    address: str
    nproc: int
    arrival: int
    #: rank its user asked for (--node-rank)
    node_rank: int | None = None
    #: open stream, None while there is none
    connection: int | None = None
    #: when this leader first heard of it
    known_since: float
    #: its lease was seen, so that its end can be told from its not having come yet
    lease_seen: bool = False
    #: when it was last heard on any stream; the time of adoption if never
    heard_at: float
    #: when the last stream ended, None while one is open
    broken_at: float | None
    #: the break is a leader's taking over, not the node's doing
    adopted: bool
    said_goodbye: str = ""
    #: its newest account of itself
    state: AgentState = UNKNOWN_STATE
    #: newest view all of its workers finished in
    finished_view: ViewNumber = NO_VIEW
    #: acknowledged view and the master port reserved for it
    prepared_view: ViewNumber = NO_VIEW
    master_port: int = 0
    condition: Condition = Condition.ALIVE
    condition_reason: str = ""
    #: it did not reach a safe point in time: left out until it reports another phase
    stuck: bool = False

    @property
    def available(self) -> bool:
        """It can be told to prepare a view."""
        return self.connection is not None and self.condition is Condition.ALIVE and not self.stuck

    def take(self, state: AgentState) -> None:
        self.state = state
        if state.phase is AgentPhase.FINISHED:
            self.finished_view = max(self.finished_view, state.view)

    def runs(self, view: ViewNumber) -> bool:
        """Its steps are steps of this view."""
        return self.state.view == view and self.state.phase is AgentPhase.RUNNING

    def as_member(self) -> Member:
        return Member(node=self.node, incarnation=self.incarnation, address=self.address, nproc=self.nproc)

    def report(self, *, in_view: bool) -> NodeReport:
        return NodeReport(
            node=self.node,
            incarnation=self.incarnation,
            address=self.address,
            nproc=self.nproc,
            condition=self.condition,
            reason=self.condition_reason,
            in_view=in_view,
            state=self.state,
        )
