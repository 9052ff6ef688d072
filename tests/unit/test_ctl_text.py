"""What elastic-ctl shows to people."""

import dataclasses
import os
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_run.runtime.ctl import text
from elastic_run.runtime.ctl.picture import from_records, from_report
from elastic_run.runtime.protocol.config import JobConfig
from elastic_run.runtime.protocol.ids import Incarnation, JobId, NodeId, ViewNumber
from elastic_run.runtime.protocol.messages import AgentPhase, AgentState, NodeReport, StatusReport
from elastic_run.runtime.protocol.records import (
    EventKind,
    EventRecord,
    JobRecords,
    JobResult,
    JobSpec,
    JobState,
    LeaderRecord,
    NodeRecord,
)
from elastic_run.runtime.protocol.view import Member, View, ViewStatus

NOW = 1_000_000.0
NODE = NodeReport(
    node=NodeId("a"),
    incarnation=Incarnation("i1"),
    address="10.0.0.1",
    nproc=4,
    condition="alive",
    reason="it talks",
    in_view=True,
    state=AgentState(view=ViewNumber(3), phase=AgentPhase.RUNNING, workers_alive=4, step_max=120, step_rate_hz=3.21),
)
REPORT = StatusReport(
    job_id=JobId("job7"),
    leader="a-1",
    fencing_token=42,
    condition="running",
    reason="node b joined",
    nodes_min=1,
    nodes_max=2,
    view=ViewNumber(3),
    world_size=4,
    restarts_used=1,
    max_restarts=5,
    step=120,
    step_rate_hz=3.21,
    last_event="view 3 installed",
    nodes=(NODE,),
)
MEMBERS = tuple(
    Member(node=NodeId(name), incarnation=Incarnation(f"i-{name}"), address="x", nproc=2) for name in ("a", "b")
)
VIEW = View(
    number=ViewNumber(2),
    status=ViewStatus.INSTALLED,
    members=MEMBERS,
    restart_count=1,
    reason="the job starts",
    proposed_at=NOW - 90,
)
LEADER = LeaderRecord(candidate="a-1", address="10.0.0.1:5")
RECORDS = JobRecords(
    spec=JobSpec(job=JobConfig(job_id=JobId("job7"), nodes_min=1, nodes_max=2, max_restarts=5), token="secret-token"),
    leader=LEADER,
    nodes=(NodeRecord(node=NodeId("a"), incarnation=Incarnation("i-a"), address="x", nproc=2),),
    views=(VIEW,),
)


@pytest.fixture
def utc() -> Iterator[None]:
    before = os.environ.get("TZ")
    os.environ["TZ"] = "UTC"
    time.tzset()
    yield
    os.environ.pop("TZ")
    if before is not None:
        os.environ["TZ"] = before
    time.tzset()


def test_status_is_a_line_for_each_thing_with_its_numbers() -> None:
    assert text.status(from_report(REPORT, RECORDS)).splitlines() == [
        "job         job7, running: node b joined",
        "leader      a-1, fencing token 42",
        "nodes       1 in the view, 1 known, 1 to 2 wanted",
        "view        3, 4 workers",
        "step        120, 3.21 steps/s",
        "restarts    1 of 5 used",
        "last event  view 3 installed",
    ]


def test_without_a_leader_the_source_and_the_reason_are_said() -> None:
    shown = text.status(from_records("job7", RECORDS, "10.0.0.1:5 can not be reached")).splitlines()
    assert shown[0] == "job         job7, unknown: 10.0.0.1:5 can not be reached"
    assert "a-1 is named in the store, but no controller answers" in shown[1]
    assert "this is what the store holds" in shown[1]
    assert shown[4] == "step        -"


def test_a_job_that_has_ended_shows_its_result_without_a_leader() -> None:
    result = JobResult(state=JobState.FAILED, message="rank 1 failed", at=NOW)
    picture = from_records("job7", dataclasses.replace(RECORDS, result=result, leader=None), "the job has ended")
    assert (picture.condition, picture.reason, picture.leader) == ("failed", "rank 1 failed", None)


def test_a_member_without_a_lease_is_shown_as_such_from_the_store() -> None:
    picture = from_records("job7", RECORDS, "nobody answers")
    assert [(n.node, n.condition, n.in_view) for n in picture.nodes] == [("a", "leased", True), ("b", "no lease", True)]


def test_the_join_token_is_in_no_picture() -> None:
    assert "secret-token" not in repr(from_records("job7", RECORDS, "nobody answers"))


def test_nodes_stand_in_aligned_columns() -> None:
    other = dataclasses.replace(NODE, node=NodeId("a-longer-name"), condition="suspect", in_view=False)
    head, first, second = text.nodes(
        from_report(dataclasses.replace(REPORT, nodes=(NODE, other)), RECORDS)
    ).splitlines()
    for name in ("CONDITION", "WORKERS", "PHASE", "VIEW", "STEP", "ADDRESS", "METRICS", "WHY"):
        column = head.index(name)
        assert all(line[column - 1] == " " and line[column] != " " for line in (head, first, second))
    assert first.split() == ["a", "alive", "4/4", "running", "3", "120", "10.0.0.1", "-", "it", "talks"]


def test_metrics_ports_are_shown_of_those_incarnations_and_that_leader_whose_they_are() -> None:
    record = dataclasses.replace(RECORDS.nodes[0], incarnation=NODE.incarnation, metrics_port=9000)
    leader = dataclasses.replace(LEADER, metrics_port=9001)
    records = dataclasses.replace(RECORDS, nodes=(record,), leader=leader)
    shown = from_report(REPORT, records)
    assert (shown.leader_metrics_port, shown.nodes[0].metrics_port) == (9001, 9000)
    assert "leader      a-1, fencing token 42, metrics on its port 9001" in text.status(shown)
    assert "10.0.0.1  9000     it talks" in text.nodes(shown)
    alone = from_records("job7", records, "nobody answers")
    assert (alone.leader_metrics_port, alone.nodes[0].metrics_port) == (9001, 9000)
    earlier = dataclasses.replace(record, incarnation=Incarnation("i0"))
    other = dataclasses.replace(leader, candidate="b-1")
    stale = from_report(REPORT, dataclasses.replace(RECORDS, nodes=(earlier,), leader=other))
    assert (stale.leader_metrics_port, stale.nodes[0].metrics_port) == (None, None)


def test_the_current_view_is_marked_and_ages_are_told() -> None:
    proposed = dataclasses.replace(VIEW, number=ViewNumber(3), status=ViewStatus.PROPOSED, proposed_at=NOW)
    lines = text.views([VIEW, proposed], now=NOW).splitlines()
    assert lines[1].split()[:2] == ["2", "*"] and "1 min ago" in lines[1]
    assert lines[2].split()[:2] == ["3", "proposed"] and "just now" in lines[2]


def test_events_show_local_time_and_age(utc: None) -> None:
    event = EventRecord(sequence=1, at=NOW, kind=EventKind.NODE_LOST, message="node b is lost")
    assert text.events([event], now=NOW + 3).splitlines()[1] == (
        "1970-01-12 13:46:40  3 s ago  node_lost  node b is lost"
    )
    assert text.event_line(event) == "1970-01-12 13:46:40  node_lost        node b is lost"


@pytest.mark.parametrize("ask", [lambda: text.views([], now=NOW), lambda: text.events([], now=NOW)])
def test_an_empty_history_is_said_in_words(ask: object) -> None:
    assert callable(ask) and ask().startswith("no ")


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (-5, "just now"),
        (0.9, "just now"),
        (3.7, "3 s ago"),
        (59, "59 s ago"),
        (60, "1 min ago"),
        (3_600, "1 h ago"),
        (90_000, "1 d ago"),
    ],
)
def test_ages(seconds: float, told: str) -> None:
    assert text.age(seconds) == told


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_any_moment_is_shown_somehow(moment: float) -> None:
    assert text.local_time(moment)


@given(st.text())
def test_nothing_from_a_job_leaves_its_line_or_controls_the_terminal(message: str) -> None:
    shown = text.event_line(EventRecord(sequence=1, at=NOW, kind=EventKind.WORKER_FAILED, message=message))
    row = text.table(("A", "B"), [(message, message)])
    assert shown.isprintable()
    assert row.count("\n") == 1 and all(line.isprintable() for line in row.split("\n"))
