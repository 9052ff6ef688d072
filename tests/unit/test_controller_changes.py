"""The controller core, story by story: planned changes, and leaders that die on the way."""

import pytest
from builders import ControllerHarness, LeaderDied, failed, failure, finish, job_config, state

from elastic_run.runtime.protocol.messages import (
    Install,
    Prepare,
)
from elastic_run.runtime.protocol.records import EventKind

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
