"""The controller core, story by story. The harness checks the order of writes and messages, and validate()s."""

import dataclasses

import pytest
from builders import ControllerHarness, LeaderDied, failure, hello, job_config, state, view

from elastic_run.controller import core
from elastic_run.controller.core import ControllerCore
from elastic_run.runtime.protocol import codec
from elastic_run.runtime.protocol.errors import InvariantViolated
from elastic_run.runtime.protocol.ids import NodeId, ViewNumber
from elastic_run.runtime.protocol.messages import (
    Install,
    JobEnded,
    Leaving,
    Prepare,
    Prepared,
    Refused,
    Welcome,
    WorkersFailed,
    WorkersFinished,
)
from elastic_run.runtime.protocol.records import EventKind, JobState, view_key
from elastic_run.runtime.protocol.view import ViewStatus

GRACE = 0.6  # just over suspicion.RECONNECT_GRACE_S


def failed(harness: ControllerHarness, node: str, rank: int = 0, age_s: float = 0.0) -> None:
    """One of the node's workers fails in the installed view."""
    number = harness.core.view.number if harness.core.view else ViewNumber(0)
    harness.say(node, WorkersFailed(view=number, failures=(failure(rank, node, age_s),)))


def finish(harness: ControllerHarness, nodes: str, number: int | None = None) -> None:
    """All workers of the nodes end with 0, in the installed view unless said otherwise."""
    assert harness.core.view is not None
    for node in nodes:
        harness.say(node, WorkersFinished(view=ViewNumber(number or harness.core.view.number)))


def state_of(harness: ControllerHarness) -> JobState | None:
    return harness.core.result.state if harness.core.result else None


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


# Losses


def test_a_lost_node_pushes_a_smaller_view_at_once_and_costs_no_restart() -> None:
    h = ControllerHarness("1:3", max_restarts=0)
    h.run("abc")
    h.running("abc", step=10, rate_hz=5.0)
    h.kill("b")
    assert h.proposed == "ac"
    assert h.last("a", Prepare).stop_at_step is None
    h.acknowledge("ac")
    assert h.installed == "ac" and h.core.restarts_used == 0


def test_a_stream_that_breaks_and_returns_changes_nothing() -> None:
    h = ControllerHarness("1:2")
    h.run("ab")
    h.cut("b")
    h.tick(1.0)
    assert h.core.change is None
    assert "is suspect: stream broken" in h.entries(EventKind.NODE_SUSPECTED)[0].message
    h.join("b", state=state("running", 1))
    h.alive("ab")
    assert h.core.change is None
    assert h.entries(EventKind.NODE_RETURNED)


def test_a_survivor_whose_stream_just_broke_is_given_its_grace_so_that_one_change_serves() -> None:
    h = ControllerHarness("1:3")
    h.run("abc")
    h.cut("c")
    h.kill("b")
    assert h.core.change is None
    h.join("c", state=state("running", 1))
    assert h.proposed == "ac"


def test_a_goodbye_is_a_loss_without_any_wait() -> None:
    h = ControllerHarness("1:2")
    h.run("ab")
    h.say("b", Leaving(reason="it received SIGTERM"))
    assert h.proposed == "a"
    assert "it received SIGTERM" in h.entries(EventKind.NODE_LOST)[0].message


def test_a_goodbye_during_a_change_starts_it_anew_without_the_node() -> None:
    h = ControllerHarness("1:2", last_call_s=0.0)
    h.join("a")
    h.join("b")
    h.say("b", Leaving(reason=""))
    assert h.proposed == "a"
    h.acknowledge("a")
    assert h.installed == "a"


def test_a_second_loss_during_a_change_starts_a_higher_one_and_abandons_the_first_in_the_same_write() -> None:
    h = ControllerHarness("1:3")
    h.run("abc")
    h.kill("c")
    assert h.proposed == "ab"
    h.actions.clear()
    h.kill("b")
    assert h.proposed == "a"
    writes = [{p.key for p in act.puts} for act in h.actions if hasattr(act, "puts")]
    assert any({view_key(ViewNumber(2)), view_key(ViewNumber(3))} <= keys for keys in writes)
    assert h.record(2).status is ViewStatus.ABANDONED
    h.acknowledge("a")
    assert h.installed == "a"


def test_nothing_waits_for_a_member_that_died_after_it_acknowledged() -> None:
    h = ControllerHarness("1:3")
    h.run("abc")
    h.kill("c")
    h.acknowledge("b")
    h.kill("b")
    h.acknowledge("a")
    assert h.installed == "a"


def test_a_node_that_comes_back_under_its_name_is_another_member() -> None:
    h = ControllerHarness("2")
    h.run("ab")
    h.cut("b")
    h.join("b", life="2")
    assert h.proposed == "ab"
    h.acknowledge("ab")
    assert h.core.view is not None and h.core.view.members[1].incarnation == "b2"
    h.unlease("b", life="1")  # the older life's lease runs out late
    h.cut("b")
    h.tick(0.2)
    assert h.core.change is None, "the lease of the older life counted against the newer"


def test_a_node_that_comes_back_during_the_change_it_was_part_of_takes_its_place_again() -> None:
    h = ControllerHarness("2")
    h.join("a")
    h.join("b")
    h.cut("b")
    h.join("b", life="2")
    h.acknowledge("ab")
    assert h.core.view is not None and h.core.view.members[1].incarnation == "b2"


def test_a_node_is_suspected_in_silence_and_lost_with_its_lease() -> None:
    h = ControllerHarness("1:2")
    h.run("ab")
    h.wait(3.0, talking="a")
    assert h.core.change is None
    h.unlease("b")
    assert h.proposed == "a"


def test_a_silent_node_that_keeps_its_lease_does_not_hold_the_job_up_for_ever() -> None:
    h = ControllerHarness("1:2")
    h.run("ab")
    failed(h, "a")
    h.wait(61.0, talking="a")
    assert h.proposed == "a"


def test_a_fenced_member_is_not_taken_for_running() -> None:
    h = ControllerHarness("1:2")
    h.run("ab")
    h.beat("b", "idle", 0)
    assert h.core.change is not None and h.core.change.view.number == 2


def test_members_that_stand_ready_for_an_abandoned_view_are_not_taken_for_running() -> None:
    """They come back to the leader that abandoned their change: the view before must not be thought to run."""
    h = ControllerHarness("1:3")
    h.run("ab")
    h.join("c")
    h.wait(1.0, talking="abc")
    assert h.proposed == "abc"
    h.acknowledge("ab")
    h.cut("a")
    h.cut("b")
    h.wait(1.0, talking="c")
    h.kill("c")  # nobody is left who could be told anything
    assert h.core.change is None and h.record(2).status is ViewStatus.ABANDONED
    h.join("a", state=state("prepared", 2), master_port=4000)
    h.join("b", state=state("prepared", 2), master_port=4000)
    h.wait(1.0, talking="ab")
    assert h.proposed, "both wait for an install that never comes"
    h.acknowledge("ab")
    assert h.installed == "ab"


def test_a_stranger_does_not_end_a_change_whose_members_all_lost_their_streams() -> None:
    h = ControllerHarness("1:3")
    h.run("abc")
    h.kill("c")
    h.cut("a")
    h.cut("b")
    h.tick(GRACE)
    number = h.core.highest
    h.join("d")
    h.tick(0.1)
    assert h.core.highest == number and h.proposed == "ab"
    h.join("a", state=state("preparing", number))
    assert set(h.proposed) == {"a", "d"}


def test_a_member_still_stopping_for_an_abandoned_view_is_not_charged_twice() -> None:
    h = ControllerHarness("1", max_restarts=1)
    h.run("a")
    failed(h, "a")
    h.tick(0.4)
    assert h.core.restarts_used == 1
    h.beat("a", "preparing", 2)
    for _ in range(122):
        h.tick(0.5)
        h.beat("a", "preparing", 2)  # its workers hang in the kernel
    assert h.core.change is None and h.record(2).status is ViewStatus.ABANDONED
    h.say("a", Prepared(view=ViewNumber(2), master_port=4000))
    assert h.proposed == "a" and h.core.restarts_used == 1
    h.acknowledge("a")
    assert h.installed == "a"


def test_two_incarnations_in_the_records_leave_the_newer_one_to_the_next_leader() -> None:
    h = ControllerHarness("2")
    h.run("ab")
    h.cut("b")
    h.join("b", life="2")
    h.take_over()
    h.join("a", state=state("preparing", 2))
    h.join("b", life="2")
    assert h.core.change is not None and h.core.change.view.number == 2, "the change was given up for nothing"
    h.acknowledge("ab")
    assert h.core.view is not None and h.core.view.members[1].incarnation == "b2"


# Too few


def test_below_min_survivors_stop_and_wait_and_go_on_when_enough_are_back() -> None:
    h = ControllerHarness("2:3")
    h.run("abc")
    h.kill("b")
    h.kill("c")
    h.acknowledge("a")
    assert h.core.change is not None and h.proposed == "a"
    assert "on hold: 1 of at least 2" in h.core.waiting_for
    h.join("c", life="2")
    h.acknowledge("ac")
    assert h.installed == "ac" and not h.core.waiting_for


def test_the_hold_ends_the_job_after_the_join_timeout() -> None:
    h = ControllerHarness("2", join_s=20.0)
    h.run("ab")
    h.kill("b")
    h.acknowledge("a")
    h.wait(21.0, talking="a")
    assert state_of(h) is JobState.FAILED
    assert h.ended and not h.last("a", JobEnded).succeeded


def test_a_job_that_lost_everybody_does_not_wait_for_ever() -> None:
    h = ControllerHarness("2", join_s=20.0)
    h.run("ab")
    h.kill("a")
    h.kill("b")
    h.join("c")
    h.wait(21.0, talking="c")
    assert state_of(h) is JobState.FAILED


def test_a_job_that_lost_everybody_forms_anew_from_strangers() -> None:
    h = ControllerHarness("1:2", last_call_s=2.0)
    h.run("ab")
    h.kill("a")
    h.kill("b")
    h.join("c")
    h.wait(3.0, talking="c")
    h.acknowledge("c")
    assert h.installed == "c"


def test_joiners_that_are_still_too_few_do_not_restart_the_hold() -> None:
    h = ControllerHarness("3:4")
    h.run("abcd")
    for node in "bcd":
        h.kill(node)
    h.acknowledge("a")
    number = h.core.highest
    h.join("e")
    h.tick(1.0)
    assert h.core.highest == number
    h.alive("ae")
    h.join("f")
    assert h.proposed == "aef"


def test_a_suspect_member_does_not_count_as_enough_with_a_joiner() -> None:
    h = ControllerHarness("3:4")
    h.run("abcd")
    h.kill("d")
    h.acknowledge("ab")
    h.cut("b")
    h.cut("c")
    h.tick(GRACE)
    number = h.core.highest
    h.join("e")
    h.tick(0.5)
    assert h.core.highest == number and h.proposed == "abc"


# Worker failures


def test_a_worker_failure_restarts_everybody_and_is_charged() -> None:
    h = ControllerHarness("2", max_restarts=2)
    h.run("ab")
    failed(h, "b", rank=2)
    h.tick(0.4)
    assert h.proposed == "ab" and h.core.restarts_used == 1
    assert "rank 2 on node b" in h.last("a", Prepare).reason and "restart 1 of 2" in h.last("a", Prepare).reason
    h.acknowledge("ab")
    assert h.last("a", Install).restart_count == 1


@pytest.mark.parametrize("max_restarts", [0, 1, 2])
def test_the_failure_after_the_last_restart_ends_the_job(max_restarts: int) -> None:
    h = ControllerHarness("1", max_restarts=max_restarts)
    h.run("a")
    for _ in range(max_restarts):
        failed(h, "a")
        h.tick(0.4)
        h.acknowledge("a")
        h.running("a")
    failed(h, "a")
    h.tick(0.4)
    assert state_of(h) is JobState.FAILED
    assert "rank 0 on node a" in h.last("a", JobEnded).message


def test_the_earliest_failure_is_blamed_also_when_it_is_heard_later() -> None:
    h = ControllerHarness("2", max_restarts=0)
    h.run("ab")
    failed(h, "a", rank=0, age_s=0.5)
    assert state_of(h) is None, "others had no time to be heard"
    h.tick(0.1)
    failed(h, "b", rank=2, age_s=2.0)
    h.tick(0.3)
    assert h.core.result is not None and h.core.result.message.startswith("rank 2 on node b")


def test_failures_of_an_older_view_are_not_heard() -> None:
    h = ControllerHarness("1")
    h.run("a")
    failed(h, "a")
    h.tick(0.4)
    h.acknowledge("a")
    h.say("a", WorkersFailed(view=ViewNumber(1), failures=(failure(),)))
    h.tick(1.0)
    assert h.core.restarts_used == 1 and h.core.change is None


def test_a_failure_told_twice_is_charged_once() -> None:
    h = ControllerHarness("1")
    h.run("a")
    failed(h, "a")
    failed(h, "a")
    h.cut("a")
    h.join("a", state=state("failed", 1), failures=(failure(age_s=0.1),))
    h.tick(0.4)
    h.alive("a")
    assert h.core.restarts_used == 1
    assert len(h.entries(EventKind.WORKER_FAILED)) == 1


def test_failures_caused_by_a_lost_node_are_not_charged() -> None:
    h = ControllerHarness("1:2", max_restarts=0)
    h.run("ab")
    h.cut("b")
    failed(h, "a")
    h.tick(0.4)
    assert state_of(h) is None
    h.tick(GRACE)
    assert h.proposed == "a" and h.core.restarts_used == 0
    assert "workers of its peers failed" in h.entries(EventKind.NODE_LOST)[0].message


def test_a_failure_waits_for_a_suspect_and_is_charged_when_it_returns() -> None:
    h = ControllerHarness("1:2")
    h.run("ab")
    failed(h, "a")
    h.cut("b")
    h.tick(0.4)
    assert h.core.change is None
    h.join("b", state=state("running", 1))
    assert h.core.restarts_used == 1 and h.proposed == "ab"


def test_a_nodes_own_failures_are_no_evidence_against_it() -> None:
    h = ControllerHarness("1:2", max_restarts=0)
    h.run("ab")
    failed(h, "b", rank=2)
    h.cut("b")
    h.wait(2.0, talking="a")
    assert h.core.change is None and len(h.core.roster) == 2, "b was declared dead for its own failure"
    h.join("b", state=state("failed", 1))
    h.tick(0.1)
    assert state_of(h) is JobState.FAILED


def test_a_spare_is_not_declared_dead_for_failures_in_a_view_it_is_not_in() -> None:
    h = ControllerHarness("1:2", max_restarts=1)
    h.run("ab")
    h.join("c")
    h.cut("c")
    failed(h, "a")
    h.cut("b")
    h.tick(1.0)
    assert h.core.roster.get(NodeId("b")) is None
    assert h.core.roster.get(NodeId("c")) is not None


def test_an_answered_failure_is_no_evidence_in_the_change_that_answers_it() -> None:
    h = ControllerHarness("1:2")
    h.run("ab")
    failed(h, "a")
    h.tick(0.4)
    h.cut("b")
    h.wait(1.0, talking="a")
    assert h.proposed == "ab"


def test_a_failure_beside_finished_members_restarts_all() -> None:
    h = ControllerHarness("2")
    h.run("ab")
    finish(h, "a")
    failed(h, "b", rank=2)
    h.tick(0.4)
    assert h.proposed == "ab" and h.core.restarts_used == 1


# Joiners


def test_late_joiner_waits_for_a_step_boundary() -> None:
    h = ControllerHarness("1:2", last_call_s=0.0)
    h.run("a")
    h.running("a", step=100, rate_hz=10.0)
    h.join("b")
    assert h.core.change is None
    h.tick(0.6)
    assert h.proposed == "ab"
    assert h.last("a", Prepare).stop_at_step == 100 + 2 + 15


def test_joiners_that_arrive_together_are_taken_in_together() -> None:
    h = ControllerHarness("1:3", last_call_s=0.0)
    h.run("a")
    h.join("b")
    h.tick(0.3)
    h.join("c")
    h.tick(0.3)
    assert h.proposed == "abc"


def test_a_joiner_during_a_planned_change_keeps_the_step_boundary() -> None:
    h = ControllerHarness("1:3", last_call_s=0.0)
    h.run("a")
    h.running("a", step=100, rate_hz=10.0)
    h.join("b")
    h.tick(0.6)
    h.join("c")
    assert h.proposed == "abc"
    assert h.last("a", Prepare).stop_at_step == 117


def test_steps_of_an_earlier_view_are_no_boundary() -> None:
    h = ControllerHarness("1:2")
    h.run("ab")
    h.running("ab", step=1000, rate_hz=5.0)
    h.kill("b")
    h.acknowledge("a")
    h.join("b", life="2")
    h.tick(0.6)
    assert h.proposed == "ab"
    assert h.last("a", Prepare).stop_at_step is None


def test_no_joiner_is_taken_in_beyond_max_and_a_spare_takes_a_lost_place() -> None:
    h = ControllerHarness("1:2")
    h.run("ab")
    h.join("c")
    h.wait(2.0, talking="abc")
    assert h.core.change is None
    h.kill("a")
    assert h.proposed == "bc"


def test_no_joiner_is_taken_in_while_a_member_has_finished() -> None:
    h = ControllerHarness("1:3", last_call_s=0.0)
    h.run("abc")
    h.kill("c")
    h.acknowledge("ab")
    h.running("ab")
    finish(h, "a")
    h.join("c", life="2")
    h.wait(2.0, talking="bc")
    assert h.core.change is None


def test_no_joiner_is_taken_in_while_a_member_is_suspect() -> None:
    h = ControllerHarness("1:3")
    h.run("abc")
    h.kill("c")
    h.acknowledge("ab")
    h.running("ab")
    h.cut("b")
    h.join("c", life="2")
    h.wait(1.5, talking="ac")
    assert h.core.change is None


def test_a_joiner_does_not_push_out_a_member_whose_stream_just_broke() -> None:
    h = ControllerHarness("1:2")
    h.run("ab")
    failed(h, "a")
    h.tick(0.4)
    assert h.proposed == "ab"
    h.cut("b")
    h.join("c")
    h.join("b", state=state("preparing", 2))
    h.acknowledge("ab")
    assert h.installed == "ab"


# The end


def test_a_job_whose_workers_all_finished_has_succeeded() -> None:
    h = ControllerHarness("2")
    h.run("ab")
    finish(h, "a")
    h.tick(1.0)
    assert state_of(h) is None
    finish(h, "b")
    assert state_of(h) is JobState.SUCCEEDED
    assert h.ended and all(h.last(node, JobEnded).succeeded for node in "ab")


def test_nothing_changes_after_the_end_and_latecomers_are_told() -> None:
    h = ControllerHarness("1:2")
    h.run("ab")
    finish(h, "ab")
    h.kill("a")
    h.tick(5.0)
    h.join("c")
    assert h.last("c", JobEnded).succeeded
    assert h.core.change is None
    h.take_over()
    h.join("d")
    assert h.last("d", JobEnded).succeeded


def test_finished_words_of_an_older_view_do_not_end_the_job() -> None:
    h = ControllerHarness("1:2")
    h.run("ab")
    h.kill("b")
    h.acknowledge("a")
    finish(h, "a", number=1)
    assert state_of(h) is None


def test_workers_that_finish_on_their_way_to_a_safe_point_are_not_run_again() -> None:
    h = ControllerHarness("1:3")
    h.run("abc")
    h.kill("c")
    h.acknowledge("ab")
    h.running("ab", step=50, rate_hz=2.0)
    h.join("c", life="2")
    h.tick(0.6)
    assert h.core.change is not None and h.core.change.view.stop_at_step is not None
    finish(h, "a")
    h.acknowledge("ac")
    finish(h, "b")
    assert state_of(h) is JobState.SUCCEEDED
    assert h.record(3).status is ViewStatus.ABANDONED


def test_a_finished_member_that_is_suspect_has_still_finished() -> None:
    h = ControllerHarness("2")
    h.run("ab")
    finish(h, "a")
    h.cut("a")
    finish(h, "b")
    assert state_of(h) is JobState.SUCCEEDED


# Leaders


def test_a_new_leader_lets_training_go_on() -> None:
    h = ControllerHarness("2")
    h.run("ab")
    h.take_over()
    h.tick(1.0)
    h.join("a", state=state("running", 1))
    h.join("b", state=state("running", 1))
    h.wait(8.0, talking="ab")
    assert h.core.change is None and h.installed == "ab" and h.count("a", Prepare) == 1
    assert h.entries(EventKind.LEADER_ELECTED)[-1].message.endswith("token 2")


def test_a_member_that_does_not_find_the_new_leader_is_lost_after_its_grace() -> None:
    h = ControllerHarness("1:2")
    h.run("ab")
    h.unlease("b")
    h.stored.pop("nodes/b", None)
    h.take_over()
    h.join("a", state=state("running", 1))
    h.wait(4.0, talking="a")
    assert h.core.change is None
    h.wait(2.0, talking="a")
    assert h.proposed == "a"


def test_a_new_leader_learns_of_failures_from_the_hellos() -> None:
    h = ControllerHarness("2", max_restarts=1)
    h.run("ab")
    failed(h, "a")
    h.take_over()
    h.join("a", state=state("failed", 1), failures=(failure(age_s=3.0),))
    h.tick(0.5)
    assert h.core.change is None, "b had no time to be found"
    h.join("b", state=state("running", 1))
    h.tick(0.4)
    assert h.proposed == "ab" and h.core.restarts_used == 1


def test_charges_outlive_the_leader_also_those_of_an_abandoned_view() -> None:
    h = ControllerHarness("1:2", max_restarts=3)
    h.run("ab")
    failed(h, "a")
    h.tick(0.4)
    h.kill("b")
    h.take_over()
    assert h.core.restarts_used == 1


def test_a_new_incarnation_alone_does_not_form_a_view_before_the_others_found_the_leader() -> None:
    h = ControllerHarness("1:3")
    h.run("abc")
    h.kill("c")
    assert h.proposed == "ab"
    h.take_over()
    h.join("b", life="2")
    h.tick(0.5)
    assert h.core.change is not None and h.core.change.view.number == 2, "a view of the newcomer alone"
    h.join("a", state=state("preparing", 2))
    assert h.proposed == "ab" and h.core.change.view.number == 3


def lose_one_of_three(h: ControllerHarness) -> None:
    h.kill("c")
    h.acknowledge("ab")


def actions_of_a_whole_change() -> int:
    h = ControllerHarness("1:3")
    h.run("abc")
    h.actions.clear()
    lose_one_of_three(h)
    return len(h.actions)


@pytest.mark.parametrize("lived", range(actions_of_a_whole_change()))
def test_a_leader_that_dies_after_any_action_of_a_change_leaves_it_to_the_next(lived: int) -> None:
    h = ControllerHarness("1:3")
    h.run("abc")
    h.actions_left = lived
    with pytest.raises(LeaderDied):
        lose_one_of_three(h)
    h.stored.pop("nodes/c", None)
    h.take_over()
    for node in "ab":
        newest = h.mail[node][-1]
        match newest:
            case Prepare(view=number):
                h.join(node, state=state("prepared", number), master_port=4000)
            case Install(view=number):
                h.join(node, state=state("running", number))
            case _:
                h.join(node, state=state("running", 1))
    h.wait(7.0, talking="ab")
    if h.core.change is not None:
        h.acknowledge("ab")
    assert h.installed == "ab" and h.core.change is None
    assert h.core.view is not None
    assert all(h.last(node, Install).view == h.core.view.number for node in "ab")


def test_the_spec_of_the_first_leader_stands() -> None:
    h = ControllerHarness("2")
    first = h.stored["spec"]
    h.job = job_config("1:9")
    h.take_over()
    assert h.stored["spec"] == first and h.core.job.nodes_max == 2


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
