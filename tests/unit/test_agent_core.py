"""The agent core, story by story; the harness validate()s and checks that nothing overlaps after every event."""

import signal

import pytest
from builders import AgentHarness, agent_config, failure, install, job_config, prepare

from elastic_run.agent.actions import (
    Announce,
    AskToPark,
    Exit,
    ReservePort,
    ShowFailures,
    StartWorkers,
    StopWorkers,
    Tell,
)
from elastic_run.agent.core import FAREWELL_TIMEOUT_S, SAFE_POINT_TIMEOUT_S, Aim
from elastic_run.runtime.protocol.errors import InvariantViolated
from elastic_run.runtime.protocol.ids import ViewNumber
from elastic_run.runtime.protocol.messages import (
    AgentPhase,
    Heartbeat,
    JobEnded,
    Leaving,
    Prepared,
    Refused,
    Welcome,
    WorkersFailed,
    WorkersFinished,
)


def welcome(current: int = 0, message: str = "hello") -> Welcome:
    return Welcome(message=message, current_view=ViewNumber(current))


# Preparing and installing


def test_an_idle_node_prepares_by_reserving_a_port() -> None:
    h = AgentHarness().hear(prepare(1))
    assert h.did(ReservePort) and not h.told(Prepared) and h.core.phase is AgentPhase.PREPARING
    h.port(4711)
    assert h.told(Prepared) == [Prepared(view=ViewNumber(1), master_port=4711)]


def test_a_running_node_acknowledges_only_when_its_workers_are_gone() -> None:
    h = AgentHarness().run().hear(prepare(2))
    assert h.did(StopWorkers)[0].term_s == h.core.config.restart_timeout_s
    h.port()
    assert not h.told(Prepared)
    h.stopped()
    assert h.told(Prepared)[0].view == 2


def test_workers_start_only_by_the_install_of_the_acknowledged_view() -> None:
    h = AgentHarness()
    assert not h.hear(install(1)).did(StartWorkers)
    h.hear(prepare(2))
    assert not h.hear(install(2)).did(StartWorkers), "not acknowledged yet"
    h.port()
    assert not h.hear(install(1)).did(StartWorkers)
    assert not h.hear(install(3)).did(StartWorkers)
    assert h.hear(install(2)).did(StartWorkers)
    assert not h.hear(install(2)).did(StartWorkers), "the same install again"


def test_a_repeated_prepare_is_acknowledged_again_and_stops_nothing() -> None:
    h = AgentHarness().hear(prepare(1)).port()
    h.hear(prepare(1))
    assert h.told(Prepared) and not h.did(StopWorkers) and not h.did(ReservePort)


def test_an_older_prepare_changes_nothing() -> None:
    h = AgentHarness().run(3)
    for number in (1, 2, 3):
        assert h.hear(prepare(number)).out == []
    assert h.core.phase is AgentPhase.RUNNING


def test_a_prepared_node_acknowledges_a_higher_view_at_once_with_the_same_port() -> None:
    h = AgentHarness().hear(prepare(1)).port(4711).hear(prepare(2))
    assert h.told(Prepared) == [Prepared(view=ViewNumber(2), master_port=4711)]


def test_a_higher_view_during_preparation_is_the_one_acknowledged() -> None:
    h = AgentHarness().run().hear(prepare(2)).hear(prepare(3)).port().stopped()
    assert [m.view for m in h.told(Prepared)] == [3]


def test_an_answer_to_an_older_stop_is_void() -> None:
    h = AgentHarness().run().hear(prepare(2)).port()
    h.stopped(starts=0)
    assert not h.told(Prepared) and h.core.busy


def test_the_ranks_of_this_node_are_announced() -> None:
    h = AgentHarness().hear(prepare(1)).port().hear(install(1, nodes=2, first_rank=2, world_size=4))
    assert h.lines == ["view 1: 2 nodes, 4 workers; this node runs ranks 2-3"]
    one = AgentHarness(agent_config(nproc=1)).hear(prepare(1)).port().hear(install(1, world_size=1))
    assert one.lines == ["view 1: 1 node, 1 workers; this node runs rank 0"]


# Safe points


def test_a_planned_change_lets_workers_park_before_they_are_stopped() -> None:
    h = AgentHarness().run().hear(prepare(2, stop_at_step=40))
    assert h.did(AskToPark) == [AskToPark(view=ViewNumber(2), step=40)] and not h.did(StopWorkers)
    h.parked(2)
    assert h.did(StopWorkers)
    h.port().stopped()
    assert h.told(Prepared)


def test_workers_that_do_not_park_in_time_are_stopped() -> None:
    h = AgentHarness().run().hear(prepare(2, stop_at_step=40)).tick(SAFE_POINT_TIMEOUT_S - 0.1)
    assert not h.did(StopWorkers)
    assert h.tick(0.2).did(StopWorkers)


def test_a_loss_during_a_planned_change_ends_the_politeness() -> None:
    h = AgentHarness().run().hear(prepare(2, stop_at_step=40)).hear(prepare(3))
    assert h.did(StopWorkers)
    h.port().stopped()
    assert h.told(Prepared)[0].view == 3


def test_workers_asked_to_park_for_an_overtaken_view_still_count_as_parked() -> None:
    h = AgentHarness().run().hear(prepare(2, stop_at_step=40)).hear(prepare(3, stop_at_step=40))
    assert not h.did(StopWorkers)
    assert h.parked(2).did(StopWorkers)


def test_parked_workers_of_another_view_do_not_count() -> None:
    h = AgentHarness().run().hear(prepare(2, stop_at_step=40))
    assert not h.parked(1).did(StopWorkers)


def test_workers_that_finish_instead_of_parking_are_told_as_finished() -> None:
    h = AgentHarness().run().hear(prepare(2, stop_at_step=40)).exited(0)
    assert not h.did(Tell)
    h.exited(1)
    assert h.told(WorkersFinished) == [WorkersFinished(view=ViewNumber(1))]
    assert h.did(StopWorkers)
    h.port().stopped()
    assert h.told(Prepared)


def test_a_worker_that_dies_instead_of_parking_lets_nobody_wait() -> None:
    h = AgentHarness().run().hear(prepare(2, stop_at_step=40)).exited(0, failure())
    assert h.did(StopWorkers)


def test_workers_without_steps_are_stopped_at_once() -> None:
    assert AgentHarness().run().hear(prepare(2, stop_at_step=None)).did(StopWorkers)


# Workers


def test_every_failure_is_told_and_the_phase_says_so() -> None:
    h = AgentHarness().run().exited(0, failure(0))
    assert h.told(WorkersFailed)[0].view == 1 and h.core.phase is AgentPhase.FAILED
    h.exited(1, failure(1))
    assert h.told(WorkersFailed)[0].failures == (failure(1),)
    h.now += 2.0
    assert [f.age_s for f in h.core.aged_failures(h.now)] == [2.0, 2.0]


def test_all_workers_ended_well_is_told_and_what_they_left_is_cleaned() -> None:
    h = AgentHarness().run().exited(0)
    assert not h.out
    h.exited(1)
    assert h.told(WorkersFinished) and h.did(StopWorkers)[0].term_s == 0.0
    h.stopped()
    assert h.core.phase is AgentPhase.FINISHED and not h.core.busy


def test_a_failure_is_not_made_good_by_workers_that_end_well() -> None:
    h = AgentHarness().run().exited(0, failure()).exited(1)
    assert h.core.phase is AgentPhase.FAILED and not h.told(WorkersFinished)


def test_the_ends_of_stopped_workers_are_nobodys_failures() -> None:
    h = AgentHarness().run().hear(prepare(2)).exited(0, failure(), view=1)
    assert not h.told(WorkersFailed)
    h.port().stopped().hear(install(2))
    assert not h.exited(0, failure(), view=1).out


def test_failures_of_an_older_view_are_forgotten_with_the_next() -> None:
    h = AgentHarness().run().exited(0, failure()).hear(prepare(2)).port().stopped().hear(install(2))
    assert h.core.failures == () and h.core.aged_failures(h.now) == ()


def test_steps_belong_to_the_view_they_were_made_in() -> None:
    h = AgentHarness().run().tick(1.0, step=70, rate_hz=3.0)
    assert (h.core.state.step_max, h.core.state.step_rate_hz) == (70, 3.0)
    h.hear(prepare(2)).port().stopped().hear(install(2))
    assert h.core.state.step_max == 0


# Fencing


def test_a_newer_view_without_this_node_stops_its_workers() -> None:
    h = AgentHarness().run().current(2)
    assert h.did(StopWorkers)
    h.stopped()
    assert h.core.phase is AgentPhase.IDLE and h.told(Heartbeat)[0].state.view == 0


def test_a_welcome_fences_like_the_store_does() -> None:
    assert AgentHarness().run().hear(welcome(current=2)).did(StopWorkers)


def test_the_own_view_or_an_older_one_fences_nobody() -> None:
    h = AgentHarness().run(2)
    assert not h.current(2).out and not h.current(1).out


def test_a_fenced_node_is_taken_in_again() -> None:
    h = AgentHarness().run().current(2).hear(prepare(3)).port().stopped()
    assert h.told(Prepared)[0].view == 3
    h.hear(install(3))
    assert h.core.phase is AgentPhase.RUNNING


def test_fencing_does_not_wait_for_a_safe_point() -> None:
    h = AgentHarness().run().hear(prepare(2, stop_at_step=40))
    assert h.current(3).did(StopWorkers)
    h.port().stopped()
    assert h.core.phase is AgentPhase.IDLE and not h.told(Prepared)


def test_a_node_ready_for_an_overtaken_view_is_idle_again() -> None:
    h = AgentHarness().hear(prepare(1)).port().current(2)
    assert h.core.phase is AgentPhase.IDLE
    assert not h.current(2).out


def test_a_fence_is_said_once() -> None:
    h = AgentHarness().run().current(2)
    assert not h.current(3).did(Announce)


# The controller is away


def test_losing_the_controller_stops_nothing() -> None:
    h = AgentHarness().hear(welcome()).run().lost()
    assert h.core.phase is AgentPhase.RUNNING and not h.did(StopWorkers)
    assert "training goes on" in h.lines[0]
    assert not h.tick(1.0).told(Heartbeat)
    assert not h.lost().lines, "said once"


def test_heartbeats_are_sent_while_a_stream_is_open() -> None:
    h = AgentHarness().hear(welcome()).tick(0.5)
    assert h.told(Heartbeat)[0].state.phase is AgentPhase.IDLE


def test_what_the_node_waits_for_is_said_once_when_it_lasts() -> None:
    h = AgentHarness().hear(welcome(message="waiting for nodes")).tick(0.5)
    assert not h.lines
    assert h.tick(1.0).lines == ["waiting for nodes"]
    assert not h.tick(1.0).lines


@pytest.mark.parametrize(("heard", "why"), [(False, "no controller was found"), (True, "waiting for 2 more")])
def test_a_node_gives_up_when_the_job_does_not_form_and_says_what_was_missing(heard: bool, why: str) -> None:
    h = AgentHarness(agent_config(job=job_config(join_s=10.0)))
    if heard:
        h.hear(welcome(message="waiting for 2 more")).tick(5.0)
    h.tick(11.0)
    assert why in h.lines[-1]
    assert h.did(Exit) == [Exit(code=1)]


def test_a_node_of_a_job_that_ran_does_not_give_up() -> None:
    h = AgentHarness(agent_config(job=job_config(join_s=10.0))).hear(welcome(current=4)).tick(100.0)
    assert not h.did(Exit)


def test_finished_workers_wait_for_the_controllers_word_within_a_bound() -> None:
    h = AgentHarness().run().exited(0).exited(1).stopped().tick(FAREWELL_TIMEOUT_S - 1)
    assert not h.did(Exit)
    assert h.tick(2.0).did(Exit) == [Exit(code=0)]


# The end


def test_a_job_that_succeeded_ends_the_agent_with_0() -> None:
    h = AgentHarness().run().exited(0).exited(1).stopped().hear(JobEnded(succeeded=True, message=""))
    assert h.did(Exit) == [Exit(code=0)]


def test_a_job_that_failed_ends_the_agent_with_1_after_its_workers() -> None:
    h = AgentHarness().run().exited(0, failure()).hear(JobEnded(succeeded=False, message="rank 0 failed"))
    assert h.did(StopWorkers) and not h.did(Exit)
    assert h.did(ShowFailures)[0].failures == (failure(),)
    assert h.lines == ["the job has failed: rank 0 failed"]
    assert h.stopped().did(Exit) == [Exit(code=1)]


def test_failures_elsewhere_are_not_shown_as_this_nodes() -> None:
    h = AgentHarness().run().hear(JobEnded(succeeded=False, message="m"))
    assert not h.did(ShowFailures)


def test_a_refused_node_ends_with_2_before_it_ran_and_with_1_after() -> None:
    assert AgentHarness().hear(Refused(reason="full")).did(Exit) == [Exit(code=2)]
    h = AgentHarness().run().hear(Refused(reason="full"))
    assert h.stopped().did(Exit) == [Exit(code=1)]


def test_a_signal_says_goodbye_and_is_passed_to_the_workers() -> None:
    h = AgentHarness().run().signal(signal.SIGTERM)
    assert h.told(Leaving)[0].reason == "it received SIGTERM"
    assert h.did(StopWorkers) == [StopWorkers(signal=signal.SIGTERM, term_s=h.core.config.shutdown_timeout_s)]
    assert h.stopped().did(Exit) == [Exit(code=128 + signal.SIGTERM)]


def test_a_signal_to_an_idle_node_ends_it_at_once() -> None:
    assert AgentHarness().signal(signal.SIGINT).did(Exit) == [Exit(code=130)]


def test_a_second_signal_kills() -> None:
    h = AgentHarness().run().signal(signal.SIGINT).signal(signal.SIGINT)
    assert h.did(StopWorkers) == [StopWorkers(signal=signal.SIGKILL, term_s=0.0)]


def test_a_leaving_node_obeys_nobody_but_repeats_its_goodbye_to_a_new_leader() -> None:
    h = AgentHarness().run().signal(signal.SIGTERM)
    assert not h.hear(prepare(2)).out and not h.current(5).out
    assert h.hear(welcome(current=1)).told(Leaving)[0].reason == "it received SIGTERM"
    assert not h.tick(1000.0).did(Exit), "workers are not gone"


def test_an_agent_that_ends_with_its_job_says_no_goodbye() -> None:
    h = AgentHarness().run().hear(JobEnded(succeeded=True, message="")).hear(welcome())
    assert not h.told(Leaving)


def test_finished_workers_are_run_again_when_the_job_needs_them() -> None:
    h = AgentHarness().run().exited(0).exited(1).hear(prepare(2)).port()
    assert not h.told(Prepared), "what the workers left behind may still run"
    h.stopped()
    assert h.told(Prepared)
    assert h.hear(install(2)).did(StartWorkers)


@pytest.mark.parametrize("what", ["busy", "port", "view"])
def test_validate_finds_what_must_never_be(what: str) -> None:
    h = AgentHarness().hear(prepare(1)).port()
    if what == "busy":
        h.core.busy = True
    elif what == "port":
        h.core.master_port = None
    else:
        h.hear(install(1))
        h.core.current_view = ViewNumber(2)
    with pytest.raises(InvariantViolated):
        h.core.validate()


def test_an_exit_without_a_code_is_our_mistake() -> None:
    h = AgentHarness()
    h.core.aim = Aim.EXIT
    with pytest.raises(InvariantViolated, match="without a code"):
        h.stopped()
