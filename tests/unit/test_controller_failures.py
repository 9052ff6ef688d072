"""The controller core, story by story: workers that fail, and how a job ends."""

import pytest
from builders import ControllerHarness, failed, failure, finish, state, state_of

from elastic_run.runtime.protocol.ids import NodeId, ViewNumber
from elastic_run.runtime.protocol.messages import (
    Install,
    JobEnded,
    Prepare,
    WorkersFailed,
)
from elastic_run.runtime.protocol.records import EventKind, JobState
from elastic_run.runtime.protocol.view import ViewStatus

GRACE = 0.6  # just over suspicion.RECONNECT_GRACE_S


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
