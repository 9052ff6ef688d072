"""Whether a view may form, and of whom: the cases by hand."""

import pytest

from elastic_run.controller.quorum import Candidate, choose, may_form
from elastic_run.runtime.protocol.ids import NodeId


def candidate(node: str, arrival: int, *, position: int | None = None, rank: int | None = None) -> Candidate:
    return Candidate(node=NodeId(node), node_rank=rank, arrival=arrival, member_position=position)


@pytest.mark.parametrize(
    ("present", "enough_for_s", "ran_before", "value", "says"),
    [
        (0, None, False, False, "0 of at least 2"),
        (1, None, True, False, "1 of at least 2"),
        (2, 0.0, False, False, "last call: 2 of 4"),
        (2, None, False, False, "last call"),
        (3, 29.9, False, False, "starting without more after 30 s"),
        (2, 30.0, False, True, "the last call of 30 s has passed"),
        (2, 0.0, True, True, "nodes are here, 2 suffice"),
        (4, 0.0, False, True, "4 of 4 nodes"),
        (9, None, True, True, "4 of 4 nodes"),
    ],
)
def test_a_view_may_form_when(
    present: int, enough_for_s: float | None, ran_before: bool, value: bool, says: str
) -> None:
    decision = may_form(
        present=present, nodes_min=2, nodes_max=4, enough_for_s=enough_for_s, last_call_s=30.0, ran_before=ran_before
    )
    assert decision.value is value
    assert says in decision.reason


def test_members_keep_their_order_and_come_before_newcomers() -> None:
    found = [candidate("new", 1), candidate("b", 2, position=1), candidate("a", 3, position=0)]
    assert choose(found, 3) == ("a", "b", "new")
    assert choose(found, 2) == ("a", "b")


def test_the_last_members_of_a_large_view_come_before_newcomers_too() -> None:
    assert choose([candidate("new", 1), candidate("seventh", 2, position=6)], 4) == ("seventh", "new")


def test_newcomers_are_taken_by_arrival() -> None:
    assert choose([candidate("late", 9), candidate("early", 1)], 1) == ("early",)


def test_asked_for_node_ranks_order_the_members() -> None:
    found = [candidate("x", 1, rank=2), candidate("y", 2, rank=0), candidate("z", 3, rank=1)]
    assert choose(found, 3) == ("y", "z", "x")


def test_an_asked_for_rank_does_not_push_a_member_out() -> None:
    found = [candidate("member", 5, position=0), candidate("wants-0", 1, rank=0)]
    assert choose(found, 1) == ("member",)


def test_equal_asked_for_ranks_are_ordered_by_arrival() -> None:
    found = [candidate("second", 2, rank=0), candidate("first", 1, rank=0)]
    assert choose(found, 2) == ("first", "second")
