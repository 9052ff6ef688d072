"""The controller core, story by story: how a job forms, who is heard, what is bounded."""

import dataclasses

import pytest
from builders import ControllerHarness, failed, failure, hello, state, view

from elastic_run.controller import core
from elastic_run.controller.core import ControllerCore
from elastic_run.runtime.protocol import codec
from elastic_run.runtime.protocol.errors import InvariantViolated
from elastic_run.runtime.protocol.ids import NodeId, ViewNumber
from elastic_run.runtime.protocol.messages import (
    Install,
    Prepare,
    Prepared,
    Refused,
    Welcome,
    WorkersFailed,
)
from elastic_run.runtime.protocol.records import EventKind, view_key
from elastic_run.runtime.protocol.view import ViewStatus

# Forming


def test_a_job_starts_at_once_when_all_places_are_taken() -> None:
    h = ControllerHarness("2")
    h.join("a")
    assert h.core.change is None and "waiting for nodes: 1 of at least 2" in h.core.waiting_for
    h.join("b")
    h.acknowledge("ab")
    assert h.installed == "ab"


def test_a_job_starts_smaller_only_after_the_last_call() -> None:
    h = ControllerHarness("2:3", last_call_s=5.0)
    h.join("a")
    h.join("b")
    h.wait(4.5, talking="ab")
    assert h.core.change is None
    h.wait(1.0, talking="ab")
    assert h.proposed == "ab"


def test_the_last_call_begins_anew_when_too_few_are_left() -> None:
    h = ControllerHarness("2:3", last_call_s=5.0)
    h.join("a")
    h.join("b")
    h.wait(4.0, talking="ab")
    h.kill("b")
    h.wait(3.0, talking="a")
    h.join("b", life="2")
    h.wait(4.0, talking="ab")
    assert h.core.change is None
    h.wait(1.5, talking="ab")
    assert h.proposed == "ab"


def test_every_member_is_told_its_own_share_of_one_world() -> None:
    h = ControllerHarness("3")
    h.join("a", nproc=2)
    h.join("b", nproc=1)
    h.join("c", nproc=3)
    h.acknowledge("abc")
    shares = [h.last(node, Install) for node in "abc"]
    assert [(s.group_rank, s.first_rank, s.world_size, s.group_world_size) for s in shares] == [
        (0, 0, 6, 3),
        (1, 2, 6, 3),
        (2, 3, 6, 3),
    ]
    assert {(s.master_addr, s.master_port) for s in shares} == {("a.host", 4000)}


def test_a_view_is_installed_only_when_every_member_acknowledged_it() -> None:
    h = ControllerHarness("3")
    for node in "abc":
        h.join(node)
    h.acknowledge("ab")
    assert h.core.view is None and h.count("a", Install) == 0
    h.say("c", Prepared(view=ViewNumber(7), master_port=1))  # of another view
    assert h.core.view is None
    h.acknowledge("c")
    assert h.installed == "abc"


def test_a_view_is_durable_as_prepared_before_it_is_installed() -> None:
    h = ControllerHarness("1")
    h.join("a")
    h.actions.clear()
    h.acknowledge("a")
    written = [
        p.record.status for act in h.actions for p in getattr(act, "puts", ()) if p.key == view_key(ViewNumber(1))
    ]
    assert written == [ViewStatus.PREPARED, ViewStatus.INSTALLED]


# Who talks to us


def test_a_refused_agent_is_told_why_and_is_no_part_of_the_job() -> None:
    h = ControllerHarness("1:2")
    h.join("a", token="wrong", lease=False)
    assert "join token" in h.last("a", Refused).reason
    assert h.closed and len(h.core.roster) == 0
    assert "join token" in h.entries(EventKind.NODE_REFUSED)[0].message


def test_a_refusal_of_a_stranger_with_an_endless_name_fits_the_journal() -> None:
    h = ControllerHarness("1:2")
    h.join("x" * 2_000_000, token="wrong", lease=False)
    assert len(h.stored) < 10 and all(len(value) < 10_000 for value in h.stored.values())


def test_a_newer_stream_of_the_same_incarnation_replaces_the_older_one() -> None:
    h = ControllerHarness("1:2")
    h.join("a")
    first = h.connections["a"]
    h.join("a")
    assert h.closed == [(first, "the agent opened a newer stream")]
    assert len(h.core.roster) == 1


def test_words_on_a_stream_that_is_not_the_nodes_any_more_change_nothing() -> None:
    h = ControllerHarness("1")
    h.run("a")
    old = h.connections["a"]
    h.join("a", state=state("running", 1))
    h.connections["a"] = old
    failed(h, "a")
    assert not h.core.failures


def test_a_second_hello_on_one_stream_closes_it() -> None:
    h = ControllerHarness("1:2")
    h.join("a")
    h.say("a", hello("a"))
    assert h.closed == [(1, "a second hello on one stream")]


def test_the_welcome_says_what_the_node_waits_for() -> None:
    h = ControllerHarness("1:2", last_call_s=0.0)
    h.join("a")
    assert "at least 1" in h.last("a", Welcome).message
    h.join("b")
    assert "view 1 is being prepared" in h.last("b", Welcome).message
    h.acknowledge("ab")
    h.running("ab")
    h.join("c")
    assert "waits as a spare" in h.last("c", Welcome).message
    h.join("a", state=state("running", 2))
    assert "view 2 runs with 2 nodes" in h.last("a", Welcome).message


def test_a_member_that_missed_its_install_gets_it_with_its_next_hello() -> None:
    h = ControllerHarness("2")
    h.join("a")
    h.join("b")
    h.acknowledge("b")
    h.cut("b")
    h.acknowledge("a")
    assert h.installed == "ab" and h.count("b", Install) == 0
    h.join("b", state=state("prepared", 1), master_port=4001)
    assert h.last("b", Install).group_rank == 1


def test_a_member_that_missed_its_prepare_gets_it_with_its_next_hello() -> None:
    h = ControllerHarness("2")
    h.join("a")
    h.join("b")
    h.cut("b")
    h.join("b")
    assert h.count("b", Prepare) == 2
    h.acknowledge("ab")
    assert h.installed == "ab"


def test_an_acknowledgement_that_was_lost_arrives_with_the_next_hello() -> None:
    h = ControllerHarness("2")
    h.join("a")
    h.join("b")
    h.acknowledge("a")
    h.cut("b")
    h.join("b", state=state("prepared", 1), master_port=4001)
    assert h.installed == "ab"


def test_view_numbers_stay_above_what_any_agent_has_seen() -> None:
    h = ControllerHarness("1")
    h.join("a", state=state("prepared", 41), master_port=4000)
    assert h.last("a", Prepare).view == 42


def test_an_older_acknowledgement_does_not_take_a_newer_one_back() -> None:
    h = ControllerHarness("2:3", last_call_s=0.0)
    h.join("a")
    h.join("b")
    h.join("c")  # view 1 of a and b gives way to view 2
    h.acknowledge("a")
    h.say("a", Prepared(view=ViewNumber(1), master_port=1))
    h.acknowledge("bc")
    assert h.installed == "abc" and h.last("a", Install).master_port == 4000


def test_a_repeated_acknowledgement_of_an_installed_view_does_not_unsettle_it() -> None:
    h = ControllerHarness("2")
    h.run("ab")
    h.say("a", Prepared(view=ViewNumber(1), master_port=9))
    h.tick(1.0)
    assert h.core.change is None and h.core.view is not None and h.core.view.master_port == 4000


# Bounds


def test_a_member_that_does_not_reach_its_safe_point_is_left_out_until_it_does() -> None:
    h = ControllerHarness("1:2")
    h.run("ab")
    failed(h, "a")
    h.tick(0.4)
    h.acknowledge("a")
    for _ in range(121):
        h.tick(0.5)
        h.beat("a", "prepared", 2)
        h.beat("b", "preparing", 2)
    assert h.proposed == "a"
    h.acknowledge("a")
    assert h.installed == "a"
    h.running("a")
    h.say("b", Prepared(view=ViewNumber(2), master_port=1))
    h.tick(0.6)
    assert h.proposed == "ab"


def test_failures_are_kept_within_a_bound() -> None:
    h = ControllerHarness("1")
    h.run("a")
    h.say("a", WorkersFailed(view=ViewNumber(1), failures=tuple(failure(rank) for rank in range(1000))))
    assert len(h.core.failures) == 64


def test_a_long_list_of_names_is_cut_short() -> None:
    names = [NodeId(f"n{i}") for i in range(20)]
    assert core._names(names).endswith("n7 and others")
    assert core._names(names[:1]) == "node n0"


def test_silence_is_noticed_also_when_others_never_stop_talking() -> None:
    """No tick comes while events wait, so heartbeats must do."""
    h = ControllerHarness("1:2")
    h.run("ab")
    for _ in range(50):
        h.now += 0.06
        h.beat("a", "running", 1)
    assert "node b is suspect: silent for" in h.entries(EventKind.NODE_SUSPECTED)[0].message


def test_a_heartbeat_that_says_nothing_new_is_not_weighed_at_once_and_one_that_does_is() -> None:
    h = ControllerHarness("1:2")
    h.run("ab")
    h.tick()
    h.now += 0.01
    roster = h.core.roster.get(NodeId("b"))
    assert roster is not None
    roster.said_goodbye = "unheard"
    h.beat("a", "running", 1, step=9)
    assert h.core.change is None
    h.beat("a", "failed", 1)
    assert h.proposed == "a"


def test_an_idle_leader_ticks_slowly_and_a_busy_one_does_not() -> None:
    h = ControllerHarness("1:2")
    h.run("ab")
    assert h.core.settled
    h.cut("b")
    assert not h.core.settled


def broken(changes: dict[str, object]) -> ControllerCore:
    h = ControllerHarness("1:2")
    h.run("ab")
    for name, value in changes.items():
        setattr(h.core, name, value)
    return h.core


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"view": view(1, "abc")}, "installed with 3 nodes"),
        ({"view": view(9, "ab")}, "above the highest"),
        ({"restarts_used": 4}, "4 restarts used of 3"),
    ],
)
def test_validate_finds_what_must_never_be(changes: dict[str, object], says: str) -> None:
    with pytest.raises(InvariantViolated, match=says):
        broken(changes).validate()


def test_validate_finds_a_change_that_is_not_newer() -> None:
    h = ControllerHarness("1:2")
    h.run("ab")
    h.kill("b")
    change = h.core.change
    assert change is not None
    h.core.change = dataclasses.replace(change, view=dataclasses.replace(change.view, number=ViewNumber(1)))
    with pytest.raises(InvariantViolated, match="out of order"):
        h.core.validate()


def test_records_are_read_back_as_they_were_written() -> None:
    h = ControllerHarness("2")
    h.run("ab")
    assert codec.encode(h.record(1)) == h.stored[view_key(ViewNumber(1))]
