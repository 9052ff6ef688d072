"""The states of a view change, and what members are told when it is over."""

import pytest
from builders import view

from elastic_run.controller.assignment import installs
from elastic_run.controller.change import advance
from elastic_run.runtime.protocol.errors import InvariantViolated
from elastic_run.runtime.protocol.ids import NodeId
from elastic_run.runtime.protocol.view import ViewStatus

ALLOWED = {
    ("proposed", "prepared"),
    ("proposed", "abandoned"),
    ("prepared", "prepared"),
    ("prepared", "installed"),
    ("prepared", "abandoned"),
}


@pytest.mark.parametrize("after", list(ViewStatus))
@pytest.mark.parametrize("before", list(ViewStatus))
def test_a_change_moves_only_along_the_table(before: ViewStatus, after: ViewStatus) -> None:
    it = view(3, status=before)
    if (before.value, after.value) in ALLOWED:
        moved = advance(it, after)
        assert moved.status is after and moved.members == it.members
    else:
        with pytest.raises(InvariantViolated, match=f"view 3 can not go from {before} to {after}"):
            advance(it, after)


def test_every_member_is_told_the_same_world_and_its_own_ranks() -> None:
    messages = installs(view(3, "abc", master_addr="m", master_port=1, restart_count=2))
    assert [messages[NodeId(n)].first_rank for n in "abc"] == [0, 2, 4]
    assert [messages[NodeId(n)].group_rank for n in "abc"] == [0, 1, 2]
    assert {(m.world_size, m.master_addr, m.restart_count) for m in messages.values()} == {(6, "m", 2)}


def test_a_view_without_a_master_is_not_told() -> None:
    with pytest.raises(InvariantViolated, match="without a master"):
        installs(view(3))
