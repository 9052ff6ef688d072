"""Checkers hold on a good history, and each deliberate violation is caught by the checker meant for it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_run.chaos.checkers import ending, progress, views
from elastic_run.chaos.checkers.judge import CHECKERS, judge
from elastic_run.chaos.checkers.verdict import Verdict
from elastic_run.chaos.history import (
    CampaignBegan,
    CurrentSeen,
    Entry,
    EventSeen,
    FaultBegan,
    FaultEnded,
    Healed,
    HealingBegan,
    History,
    LeaderSeen,
    LeftBehind,
    NodeEnded,
    NodeStarted,
    ResultSeen,
    StepDone,
    ViewSeen,
    decode,
    encode,
)
from elastic_run.chaos.report import fault_table, verdict_lines
from elastic_run.runtime.protocol.errors import CodecError

SAVE_EVERY = 5
MEMBERS = ("n1", "n2")


def view(at_s: float, number: int, *, members: tuple[str, ...] = MEMBERS, restarts: int = 0) -> list[Entry]:
    """A view from proposal to installation."""
    states = ("proposed", "prepared", "installed")
    seen: list[Entry] = [
        ViewSeen(at_s=at_s, number=number, status=state, members=members, restart_count=restarts) for state in states
    ]
    return [*seen, CurrentSeen(at_s=at_s, number=number)]


def steps(from_s: float, first: int, last: int, *, pid: int, world_size: int = 2) -> list[Entry]:
    """Ten steps a second."""
    return [
        StepDone(at_s=from_s + 0.1 * i, step=step, world_size=world_size, pid=pid, loss=1.0 / step)
        for i, step in enumerate(range(first, last + 1))
    ]


def fault(at_s: float, number: int, victim: str, action: str, *, lasts_s: float = 0.0) -> list[Entry]:
    node = "" if "etcd" in victim else "n2"
    began = FaultBegan(at_s=at_s, number=number, victim=victim, action=action, what=f"{victim} x", node=node)
    return [began, FaultEnded(at_s=at_s + lasts_s, number=number)]


def good_history() -> list[Entry]:
    """Two nodes; one is killed and comes back, later the leader is killed in calm; all ends well."""
    entries = [
        NodeStarted(at_s=1.0, node="n1"),
        NodeStarted(at_s=1.0, node="n2"),
        LeaderSeen(at_s=2.0, candidate="n1-a", token=3),
        EventSeen(at_s=2.0, sequence=1, kind="leader_elected", message="n1-a leads"),
        *view(3.0, 1),
        *steps(5.0, 1, 47, pid=10),
        *fault(10.0, 1, "agent", "kill -9"),
        NodeEnded(at_s=10.1, node="n2", code=1),
        *view(10.5, 2, members=("n1",)),
        NodeStarted(at_s=11.5, node="n2"),
        *steps(12.0, 46, 50, pid=11, world_size=1),
        *view(12.6, 3),
        *steps(15.0, 51, 600, pid=12),
        *fault(40.0, 2, "leader", "kill -9"),
        LeaderSeen(at_s=42.0, candidate="n2-b", token=30),
        EventSeen(at_s=42.0, sequence=2, kind="leader_elected", message="n2-b leads"),
        HealingBegan(at_s=60.0),
        Healed(at_s=60.1),
        ResultSeen(at_s=71.0, state="succeeded", message="all finished"),
        NodeEnded(at_s=72.0, node="n1", code=0),
        NodeEnded(at_s=72.0, node="n2", code=0),
    ]
    began: list[Entry] = [CampaignBegan(at_s=0.0, seed=1, nodes=2, save_every=SAVE_EVERY)]
    return began + sorted(entries, key=lambda entry: entry.at_s)


def with_more(*more: Entry) -> list[Entry]:
    """The good history and these, in order of time."""
    began, *rest = good_history()
    return [began, *sorted([*rest, *more], key=lambda entry: entry.at_s)]


def without(drop: Callable[[Entry], bool]) -> list[Entry]:
    return [entry for entry in good_history() if not drop(entry)]


def changed(fits: Callable[[Entry], bool], **fields: object) -> list[Entry]:
    """The good history with the first fitting entry changed."""
    history = good_history()
    index = next(i for i, entry in enumerate(history) if fits(entry))
    history[index] = dataclasses.replace(history[index], **fields)  # type: ignore[arg-type]
    return history


def only_failure(history: list[Entry]) -> Verdict:
    """The one verdict that does not hold."""
    (failed,) = [verdict for verdict in judge(history) if not verdict.held]
    return failed


@pytest.mark.parametrize("checker", CHECKERS, ids=lambda checker: checker.__name__)
def test_a_good_history_holds(checker: Callable[[list[Entry]], Verdict]) -> None:
    assert checker(good_history()).problems == ()


def test_a_view_installed_without_being_prepared_is_caught() -> None:
    history = without(lambda e: isinstance(e, ViewSeen) and e.number == 2 and e.status == "prepared")
    assert only_failure(history).problems == ("view 2 became installed after proposed",)


def test_an_installed_view_that_is_abandoned_is_caught() -> None:
    late = ViewSeen(at_s=20.0, number=3, status="abandoned", members=MEMBERS, restart_count=0)
    assert only_failure(with_more(late)).problems == ("view 3 became abandoned after installed",)


def test_a_view_number_used_late_is_caught() -> None:
    skipped = without(lambda e: isinstance(e, ViewSeen) and e.number == 2)
    late = [e for e in view(16.0, 2, members=("n1",)) if isinstance(e, ViewSeen)]
    verdict = views.views_only_grow([*skipped, *late])
    assert verdict.problems == ("view 2 appeared after view 3",)


def test_members_that_change_after_the_proposal_are_caught() -> None:
    history = changed(lambda e: isinstance(e, ViewSeen) and e.status == "installed", members=("n1",))
    assert "had members" in only_failure(history).problems[0]


def test_a_current_view_that_goes_back_is_caught() -> None:
    assert only_failure(with_more(CurrentSeen(at_s=50.0, number=2))).problems == ("the current view went from 3 to 2",)


def test_a_current_view_that_was_never_installed_is_caught() -> None:
    assert only_failure(with_more(CurrentSeen(at_s=50.0, number=9))).problems == (
        "view 9 became current and was never installed",
    )


def test_a_token_that_does_not_grow_is_caught() -> None:
    history = changed(lambda e: isinstance(e, LeaderSeen) and e.token == 30, token=3)
    assert only_failure(history).problems == ("n2-b leads with token 3 after n1-a with 3",)


def test_a_lost_event_is_caught() -> None:
    history = changed(lambda e: isinstance(e, EventSeen) and e.sequence == 2, sequence=3)
    assert only_failure(history).problems == ("event 3 follows event 1",)


def test_steps_that_stop_without_a_disturbance_are_caught() -> None:
    history = without(lambda e: isinstance(e, StepDone) and e.at_s >= 14.0)
    problems = progress.steps_advance(history).problems
    assert problems == (
        "no step for 27.6 s although nothing disturbed",
        "no step for 20.1 s although nothing disturbed",
    )


def test_a_standstill_while_the_store_is_paused_is_excused() -> None:
    history = without(lambda e: isinstance(e, StepDone) and e.at_s >= 14.0)
    history += fault(14.0, 9, "all of etcd", "pause", lasts_s=46.0)
    assert progress.steps_advance(history).held


def test_a_standstill_while_no_node_is_up_is_excused() -> None:
    history = without(lambda e: isinstance(e, StepDone) and e.at_s >= 14.0)
    away: list[Entry] = []
    for node in MEMBERS:
        away += [NodeEnded(at_s=14.0, node=node, code=1), NodeStarted(at_s=59.0, node=node)]
    began, *rest = history
    history = [began, *sorted([*rest, *away], key=lambda entry: entry.at_s)]
    assert progress.steps_advance(history).held


def test_training_that_begins_anew_is_caught() -> None:
    again = StepDone(at_s=14.9, step=1, world_size=2, pid=12, loss=1.0)
    assert only_failure(with_more(again)).problems == ("step 1 (pid 12) follows step 50",)


def test_training_that_skips_a_step_is_caught() -> None:
    history = without(lambda e: isinstance(e, StepDone) and e.step == 51)
    assert only_failure(history).problems == ("step 52 (pid 12) follows step 50",)


def test_a_step_done_again_with_another_loss_is_caught() -> None:
    history = changed(lambda e: isinstance(e, StepDone) and e.pid == 11, loss=0.5)
    assert "when it was done again" in only_failure(history).problems[0]


def test_a_worker_of_an_old_view_that_goes_on_is_caught() -> None:
    zombie = StepDone(at_s=12.25, step=48, world_size=2, pid=10, loss=1.0 / 48)
    assert only_failure(with_more(zombie)).problems == ("worker 10 did step 48 after worker 11 had taken over",)


def test_a_view_change_after_the_death_of_a_controller_in_calm_is_caught() -> None:
    history = with_more(*view(43.0, 4))
    assert only_failure(history).problems == ("a view was proposed 3.0 s after fault 2 (kill -9 of leader)",)


def test_a_view_change_after_a_node_was_disturbed_too_is_none_of_the_controllers() -> None:
    assert progress.control_plane_faults_change_no_view(
        with_more(*view(43.0, 4), *fault(42.5, 3, "worker", "kill -9"))
    ).held


def test_a_lost_node_charged_as_a_worker_failure_is_caught() -> None:
    history = changed(lambda e: isinstance(e, ViewSeen) and e.number == 3, restart_count=1)
    assert only_failure(history).problems == ("1 restarts are charged for 0 workers that were ended",)


def test_nodes_that_do_not_come_back_are_caught() -> None:
    assert not ending.everything_comes_back(without(lambda e: isinstance(e, Healed))).held


@pytest.mark.parametrize(
    "history",
    [
        changed(lambda e: isinstance(e, NodeEnded) and e.at_s > 70.0, code=1),
        without(lambda e: isinstance(e, NodeEnded) and e.at_s > 70.0),
        changed(lambda e: isinstance(e, ResultSeen), state="failed"),
        without(lambda e: isinstance(e, ResultSeen)),
        with_more(ResultSeen(at_s=71.5, state="succeeded", message="again")),
    ],
    ids=["exit code 1", "never ended", "failed", "no result", "two results"],
)
def test_a_job_that_does_not_end_well_is_caught(history: list[Entry]) -> None:
    assert not ending.the_job_succeeds_everywhere(history).held


def test_what_is_left_behind_is_caught() -> None:
    assert only_failure(with_more(LeftBehind(at_s=80.0, what="process 7"))).problems == ("process 7",)


def test_an_empty_campaign_fails() -> None:
    began: list[Entry] = [CampaignBegan(at_s=0.0, seed=1, nodes=2, save_every=SAVE_EVERY)]
    failed = {verdict.claim for verdict in judge(began) if not verdict.held}
    assert failed == {
        "steps advance while a node is up and the control plane healthy",
        "after the last fault all nodes come back",
        "the job ends well on every node",
    }


def test_a_history_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = History(path)
    for entry in good_history():
        history.add(entry)
    history.close()
    assert path.stat().st_mode & 0o777 == 0o600
    assert decode(path.read_bytes().splitlines()) == good_history() == history.entries


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b'{"entry": "Nonsense"}',
        b'{"entry": "Healed"}',
        b'{"entry": "Healed", "at_s": "1"}',
        b'{"entry": "Healed", "at_s": true}',
        b'{"entry": "Healed", "at_s": 1.0, "more": 2}',
    ],
)
def test_a_line_that_is_no_entry_is_refused_by_its_number(line: bytes) -> None:
    with pytest.raises(CodecError, match="line 2 "):
        decode([encode(Healed(at_s=1.0)), line])


def test_every_line_is_plain_json() -> None:
    assert json.loads(encode(Healed(at_s=1.0))) == {"entry": "Healed", "at_s": 1.0}


def test_the_table_tells_the_time_to_the_next_step_and_the_longest_pause() -> None:
    header, kill, leader = fault_table(good_history())
    assert header.split() == ["at", "fault", "hit", "next", "step", "longest", "pause"]
    assert kill.split() == ["10.0", "s", "kill", "-9", "agent", "agent", "x", "2.00", "s", "2.60", "s"]
    assert leader.split() == ["40.0", "s", "kill", "-9", "leader", "leader", "x", "0.10", "s", "0.10", "s"]


def test_verdicts_name_their_problems() -> None:
    lines = verdict_lines(judge(with_more(LeftBehind(at_s=80.0, what="process 7"))))
    assert lines[-2].startswith("FAIL  nothing is left behind") and lines[-1].strip() == "process 7"
    assert all(line.startswith("ok") for line in lines[:-2])
