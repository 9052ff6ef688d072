"""The controller core, story by story: nodes that are lost, come back, or are too few."""

from builders import ControllerHarness, failed, state, state_of

from elastic_run.runtime.protocol.ids import ViewNumber
from elastic_run.runtime.protocol.messages import (
    JobEnded,
    Leaving,
    Prepare,
    Prepared,
)
from elastic_run.runtime.protocol.records import EventKind, JobState, view_key
from elastic_run.runtime.protocol.view import ViewStatus

GRACE = 0.6  # just over suspicion.RECONNECT_GRACE_S


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
