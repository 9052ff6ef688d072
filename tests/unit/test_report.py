"""The leader's picture of the job."""

from builders import ControllerHarness, failure

from elastic_run.controller.report import report
from elastic_run.runtime.protocol.ids import ViewNumber
from elastic_run.runtime.protocol.messages import WorkersFailed, WorkersFinished


def test_a_forming_job_says_what_it_waits_for() -> None:
    h = ControllerHarness("2")
    h.join("a")
    picture = report(h.core)
    assert (picture.condition, picture.view, picture.world_size) == ("forming", 0, 0)
    assert "1 of at least 2" in picture.reason
    assert [(n.node, n.condition, n.in_view) for n in picture.nodes] == [("a", "alive", False)]


def test_a_running_job_shows_the_steps_of_its_view_and_not_those_of_others() -> None:
    h = ControllerHarness("1:2")
    h.run("ab")
    h.running("a", step=10, rate_hz=2.0)
    h.running("b", step=11, rate_hz=1.5)
    h.join("c")
    h.beat("c", "running", 9, step=999)
    picture = report(h.core)
    assert (picture.condition, picture.step, picture.step_rate_hz) == ("running", 11, 2.0)
    assert (picture.view, picture.world_size, picture.leader, picture.fencing_token) == (1, 4, "c", 1)
    assert [n.in_view for n in picture.nodes] == [True, True, False]
    assert picture.last_event == "node c is here with 2 workers"


def test_another_life_of_a_member_is_not_in_the_view() -> None:
    h = ControllerHarness("1:2")
    h.run("ab")
    h.cut("b")
    h.join("b", life="2")
    assert [n.in_view for n in report(h.core).nodes] == [True, False]


def test_a_changing_job_says_why() -> None:
    h = ControllerHarness("1:2")
    h.run("ab")
    h.kill("b")
    picture = report(h.core)
    assert picture.condition == "changing" and "node b lost" in picture.reason


def test_a_job_that_lost_everybody_is_not_said_to_run() -> None:
    h = ControllerHarness("2")
    h.run("ab")
    h.kill("a")
    h.kill("b")
    picture = report(h.core)
    assert picture.condition == "forming" and "0 of at least 2" in picture.reason


def test_an_ended_job_says_how_it_ended() -> None:
    h = ControllerHarness("1", max_restarts=0)
    h.run("a")
    h.say("a", WorkersFailed(view=ViewNumber(1), failures=(failure(),)))
    h.tick(0.4)
    assert report(h.core).condition == "failed" and "rank 0" in report(h.core).reason
    good = ControllerHarness("1")
    good.run("a")
    good.say("a", WorkersFinished(view=ViewNumber(1)))
    assert report(good.core).condition == "succeeded"
