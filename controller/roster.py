"""All nodes the leader knows, their streams and leases, and the judgement over each.

Invariants:
1. One incarnation per name; a stream belongs to at most one node, and a node has at most one stream (validate()).
2. A lease seen before the agent's stream counts from the moment the stream opens; one that was never seen is not
   missed at once (tests/unit/test_roster.py).
Not here: the rule by which a node is judged (suspicion.py); who is refused (admission.py).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from elastic_run.controller import suspicion
from elastic_run.controller.node import Node
from elastic_run.controller.suspicion import Condition, Evidence
from elastic_run.runtime.protocol.errors import InvariantViolated
from elastic_run.runtime.protocol.ids import Incarnation, NodeId
from elastic_run.runtime.protocol.messages import AgentPhase, Hello
from elastic_run.runtime.protocol.view import Member

NODES_MAX = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A node whose condition changed."""

    node: Node
    before: Condition
    reason: str


class Roster:
    def __init__(self) -> None:
        #: by name, in order of arrival
        self._nodes: dict[NodeId, Node] = {}
        self._by_connection: dict[int, NodeId] = {}
        self._leases: dict[NodeId, Incarnation] = {}
        self._arrivals = 0

    def __iter__(self) -> Iterator[Node]:
        return iter(tuple(self._nodes.values()))

    def __len__(self) -> int:
        return len(self._nodes)

    def get(self, name: NodeId) -> Node | None:
        return self._nodes.get(name)

    def holder(self, member: Member) -> Node | None:
        """Return the node behind a member, None when it is gone or came back as another incarnation."""
        node = self._nodes.get(member.node)
        return node if node is not None and node.incarnation == member.incarnation else None

    def of(self, connection: int) -> Node | None:
        name = self._by_connection.get(connection)
        return None if name is None else self._nodes[name]

    @property
    def connections(self) -> tuple[int, ...]:
        return tuple(self._by_connection)

    def adopt(self, members: Iterable[Member], now: float) -> None:
        """Take over members of a view that an earlier leader knew; they have yet to find this one."""
        for member in members:
            if member.node not in self._nodes:
                node = self._add(member, now)
                node.adopted, node.condition = True, Condition.SUSPECT

    def admit(self, connection: int, hello: Hello, now: float) -> tuple[Node, int | None, bool]:
        """Bind a stream to its node. Returns the node, the stream it replaces, and whether the node is new."""
        known = self._nodes.get(hello.node)
        if known is not None and known.incarnation != hello.incarnation:
            raise InvariantViolated(f"{hello.node} was admitted before its earlier incarnation was removed")
        new = known is None
        node = known or self._add(
            Member(node=hello.node, incarnation=hello.incarnation, address=hello.address, nproc=hello.nproc), now
        )
        replaced = node.connection
        if replaced is not None:
            del self._by_connection[replaced]
        self._by_connection[connection] = node.node
        if node.adopted:  # it only had to find the new leader
            node.condition = Condition.ALIVE
        node.connection, node.broken_at, node.adopted, node.heard_at = connection, None, False, now
        node.node_rank = hello.node_rank
        node.take(hello.state)
        if hello.state.phase is AgentPhase.PREPARED and hello.master_port is not None:
            node.prepared_view, node.master_port = hello.state.view, hello.master_port
        return node, replaced, new

    def disconnected(self, connection: int, now: float) -> None:
        name = self._by_connection.pop(connection, None)
        if name is not None:
            node = self._nodes[name]
            node.connection, node.broken_at = None, now

    def remove(self, node: Node) -> None:
        del self._nodes[node.node]
        if node.connection is not None:
            del self._by_connection[node.connection]

    def lease_seen(self, node: NodeId, incarnation: Incarnation) -> None:
        self._leases[node] = incarnation
        known = self._nodes.get(node)
        if known is not None and known.incarnation == incarnation:
            known.lease_seen = True

    def lease_gone(self, node: NodeId, incarnation: Incarnation) -> None:
        if self._leases.get(node) == incarnation:
            del self._leases[node]

    def judge(
        self, now: float, *, members: Sequence[Member] = (), failed: frozenset[NodeId] = frozenset()
    ) -> list[Turn]:
        """Judge every node anew; return those whose condition changed, in order of arrival.

        Workers of the `failed` nodes have failed: that counts against the other `members` of their view.
        """
        inside = {member.node for member in members}
        turns = []
        for node in self._nodes.values():
            peers_failed = node.node in inside and len(failed) > (node.node in failed)
            verdict = suspicion.judge(self._evidence(node, now, peers_failed=peers_failed))
            before, node.condition = node.condition, verdict.value
            node.condition_reason = verdict.reason
            if verdict.value is not before:
                turns.append(Turn(node=node, before=before, reason=verdict.reason))
        return turns

    def validate(self) -> None:
        for connection, name in self._by_connection.items():
            if self._nodes[name].connection != connection:
                raise InvariantViolated(f"stream {connection} and node {name} disagree")
        for node in self._nodes.values():
            if (node.connection is None) == (node.broken_at is None):
                raise InvariantViolated(f"node {node.node} has both or neither of a stream and a break")

    def _add(self, member: Member, now: float) -> Node:
        if len(self._nodes) >= NODES_MAX:
            raise InvariantViolated(f"over {NODES_MAX} nodes")
        self._arrivals += 1
        node = Node(
            node=member.node,
            incarnation=member.incarnation,
            address=member.address,
            nproc=member.nproc,
            arrival=self._arrivals,
            known_since=now,
            lease_seen=self._leases.get(member.node) == member.incarnation,
            heard_at=now,
            broken_at=now,
            adopted=False,
        )
        self._nodes[member.node] = node
        return node

    def _evidence(self, node: Node, now: float, *, peers_failed: bool) -> Evidence:
        held = self._leases.get(node.node) == node.incarnation
        since = node.broken_at if node.broken_at is not None else node.heard_at
        return Evidence(
            said_goodbye=node.said_goodbye,
            lease_gone=not held and (node.lease_seen or now - node.known_since >= suspicion.LEASE_UNSEEN_S),
            heard_age_s=None if node.connection is None else now - node.heard_at,
            unheard_age_s=now - since,
            adopted=node.adopted,
            peers_failed=peers_failed,
        )
