"""Streams, leases and incarnations, and the judgement over each node."""

import pytest
from builders import hello, member, state

from elastic_run.controller.node import Node
from elastic_run.controller.roster import Roster
from elastic_run.controller.suspicion import ADOPTION_GRACE_S, LEASE_UNSEEN_S, Condition
from elastic_run.runtime.protocol.errors import InvariantViolated
from elastic_run.runtime.protocol.ids import Incarnation, NodeId

A, B, A1 = NodeId("a"), NodeId("b"), Incarnation("a1")


def admitted(roster: Roster, node: str = "a", connection: int = 1, now: float = 0.0) -> Node:
    return roster.admit(connection, hello(node), now)[0]


def test_a_stream_binds_a_node_and_a_newer_one_replaces_it() -> None:
    roster = Roster()
    first, replaced, new = roster.admit(1, hello("a"), 0.0)
    assert (replaced, new) == (None, True)
    again, replaced, new = roster.admit(2, hello("a"), 1.0)
    assert again is first and (replaced, new) == (1, False)
    assert roster.of(1) is None and roster.of(2) is first and roster.connections == (2,)
    roster.disconnected(1, 2.0)  # the replaced stream's end says nothing
    assert first.connection == 2
    roster.validate()


def test_two_lives_of_a_name_never_stand_side_by_side() -> None:
    roster = Roster()
    admitted(roster)
    with pytest.raises(InvariantViolated, match="earlier incarnation"):
        roster.admit(2, hello("a", life="2"), 0.0)


def test_a_member_has_a_holder_only_while_its_own_incarnation_is_here() -> None:
    roster = Roster()
    node = admitted(roster)
    assert roster.holder(member("a")) is node
    assert roster.holder(member("a", life="2")) is None
    roster.remove(node)
    assert roster.holder(member("a")) is None and roster.of(1) is None and len(roster) == 0


def test_a_node_without_a_stream_can_be_removed() -> None:
    roster = Roster()
    node = admitted(roster)
    roster.disconnected(1, 1.0)
    roster.remove(node)
    assert len(roster) == 0


def test_a_lease_seen_before_the_stream_counts_from_the_moment_it_opens() -> None:
    roster = Roster()
    roster.lease_seen(A, A1)
    node = admitted(roster)
    roster.disconnected(1, 1.0)
    roster.judge(2.0)
    assert node.condition is Condition.SUSPECT


def test_only_the_own_incarnations_lease_counts() -> None:
    roster = Roster()
    node = admitted(roster)
    roster.lease_seen(A, Incarnation("a0"))
    roster.disconnected(1, 1.0)
    roster.judge(LEASE_UNSEEN_S)
    assert node.condition is Condition.DEAD


def test_a_lease_that_was_not_seen_yet_is_not_missed() -> None:
    roster = Roster()
    node = admitted(roster)
    roster.disconnected(1, 1.0)
    roster.judge(LEASE_UNSEEN_S - 0.1)
    early = node.condition
    roster.lease_seen(A, A1)
    roster.judge(LEASE_UNSEEN_S + 1.0)
    assert (early, node.condition) == (Condition.SUSPECT, Condition.SUSPECT)
    roster.lease_gone(A, A1)
    told = roster.judge(LEASE_UNSEEN_S + 1.1)
    assert [turn.node.condition for turn in told] == [Condition.DEAD]


def test_the_end_of_an_older_lease_does_not_take_a_newer_one_away() -> None:
    roster = Roster()
    node = admitted(roster)
    roster.lease_seen(A, A1)
    roster.lease_gone(A, Incarnation("a0"))
    roster.disconnected(1, 1.0)
    told = roster.judge(1.1)
    roster.lease_gone(A, A1)
    told += roster.judge(1.2)
    assert [turn.before for turn in told] == [Condition.ALIVE, Condition.SUSPECT]
    assert node.condition is Condition.DEAD


def test_only_changes_of_condition_are_told_in_order_of_arrival() -> None:
    roster = Roster()
    for connection, node in enumerate("ba"):
        admitted(roster, node, connection)
        roster.lease_seen(NodeId(node), Incarnation(f"{node}1"))
    assert roster.judge(0.1) == []
    roster.disconnected(0, 0.2)
    roster.disconnected(1, 0.2)
    assert [turn.node.node for turn in roster.judge(0.3)] == ["b", "a"]
    assert roster.judge(0.4) == []
    assert "stream broken for 0.2 s" in next(iter(roster)).condition_reason


def test_an_adopted_node_is_suspect_until_it_finds_its_way_and_has_longer_for_it() -> None:
    roster = Roster()
    roster.adopt((member("a"), member("b")), now=0.0)
    assert roster.judge(ADOPTION_GRACE_S - 0.1) == []
    node = admitted(roster)
    assert node.condition is Condition.ALIVE and not node.adopted
    roster.judge(ADOPTION_GRACE_S)
    other = roster.get(B)
    assert other is not None and other.condition is Condition.DEAD


def test_adopting_a_name_again_keeps_the_first() -> None:
    roster = Roster()
    roster.adopt((member("a", life="2"),), now=0.0)
    roster.adopt((member("a", life="1"),), now=0.0)
    assert roster.holder(member("a", life="2")) is not None


def test_failures_of_peers_count_only_inside_the_view_and_not_ones_own() -> None:
    roster = Roster()
    for connection, node in enumerate("abc"):
        admitted(roster, node, connection)
        roster.lease_seen(NodeId(node), Incarnation(f"{node}1"))
        roster.disconnected(connection, 0.0)
    roster.judge(1.0, members=(member("a"), member("b")), failed=frozenset({A}))
    assert [node.condition for node in roster] == [Condition.SUSPECT, Condition.DEAD, Condition.SUSPECT]


def test_a_hello_brings_the_acknowledgement_its_last_stream_may_have_lost() -> None:
    roster = Roster()
    node = roster.admit(1, hello("a", state=state("prepared", 7), master_port=4711, node_rank=3), 0.0)[0]
    assert (node.prepared_view, node.master_port, node.node_rank) == (7, 4711, 3)
    other = roster.admit(2, hello("b", state=state("preparing", 7), master_port=None), 0.0)[0]
    assert other.prepared_view == 0


def test_a_hello_tells_that_the_workers_had_finished() -> None:
    node = Roster().admit(1, hello("a", state=state("finished", 7)), 0.0)[0]
    assert node.finished_view == 7


def test_validate_finds_streams_and_breaks_that_disagree() -> None:
    roster = Roster()
    node = admitted(roster)
    node.connection = 9
    with pytest.raises(InvariantViolated, match="disagree"):
        roster.validate()
    node.connection, node.broken_at = 1, 3.0
    with pytest.raises(InvariantViolated, match="both or neither"):
        roster.validate()


def test_the_number_of_nodes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_run.controller.roster.NODES_MAX", 1)
    roster = Roster()
    admitted(roster)
    with pytest.raises(InvariantViolated, match="over 1 nodes"):
        admitted(roster, "b", 2)
