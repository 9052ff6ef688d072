"""Who may be part of the job, and what the others are told."""

import dataclasses
from typing import Any

import pytest
from builders import hello, job_config, job_spec, member, view

from elastic_run.controller.admission import why_refuse
from elastic_run.controller.roster import Roster
from elastic_run.controller.suspicion import Condition
from elastic_run.runtime.protocol.ids import NodeId
from elastic_run.runtime.protocol.messages import Hello

ELASTIC = job_config("1:4")
FIXED = job_config("2")


def full_roster() -> Roster:
    roster = Roster()
    for number, node in enumerate("ab"):
        roster.admit(number, hello(node), now=0.0)
    return roster


def refusal(said: Hello, *, fixed: bool = False, changing: bool = False, roster: Roster | None = None) -> str:
    spec = job_spec(FIXED if fixed else ELASTIC)
    reason = why_refuse(said, spec, roster or full_roster(), view(1, "ab"), changing=changing)
    assert "\n" not in reason
    return reason


def test_a_node_of_this_job_is_welcome() -> None:
    assert refusal(hello("c")) == ""


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"protocol_version": 99}, "speaks protocol version 99, the controller 1"),
        ({"job_id": "other"}, "does not belong to job j"),
        ({"token": "guessed"}, "wrong job id or join token"),
        ({"nproc": 0}, "it brings 0 workers"),
        ({"nodes_max": 5}, "--nnodes=1:5, but job j runs with --nnodes=1:4"),
        ({"nodes_min": 2}, "--nnodes=2:4"),
        ({"max_restarts": 0}, "--max-restarts=0, but job j runs with --max-restarts=3"),
        ({"node": "../etc"}, "node name '../etc' is not usable"),
        ({"node": "x" * 4000}, "is not usable"),
    ],
)
def test_a_node_that_does_not_fit_is_told_what_to_change(changes: dict[str, Any], says: str) -> None:
    reason = refusal(dataclasses.replace(hello("c"), **changes))
    assert says in reason
    assert len(reason) < 500


def test_the_version_is_checked_before_anything_that_may_mean_something_else_there() -> None:
    assert "version" in refusal(hello("c", protocol_version=2, token="x", nproc=0))


def test_the_token_is_checked_before_anything_is_said_about_the_job() -> None:
    assert refusal(hello("c", token="x", nodes_max=99)) == refusal(hello("c", token="x"))


def test_a_name_that_is_taken_by_a_living_node_is_refused() -> None:
    assert "--node-name" in refusal(hello("a", life="2"))


def test_a_name_whose_node_is_suspect_may_be_taken_by_its_next_life() -> None:
    roster = full_roster()
    node = roster.get(NodeId("a"))
    assert node is not None
    node.condition = Condition.SUSPECT
    assert refusal(hello("a", life="2"), roster=roster) == ""


def test_the_same_incarnation_may_always_open_another_stream() -> None:
    assert refusal(hello("a")) == ""
    assert refusal(hello("a", job=FIXED), fixed=True) == ""


def test_a_complete_job_of_fixed_size_takes_nobody() -> None:
    assert "is complete with 2 of 2 nodes" in refusal(hello("c", job=FIXED), fixed=True)


def test_a_job_of_fixed_size_takes_a_replacement_while_it_is_changing_or_unwell() -> None:
    assert refusal(hello("c", job=FIXED), fixed=True, changing=True) == ""
    roster = full_roster()
    node = roster.get(NodeId("b"))
    assert node is not None
    node.condition = Condition.SUSPECT
    assert refusal(hello("c", job=FIXED), fixed=True, roster=roster) == ""
    roster.remove(node)
    assert refusal(hello("c", job=FIXED), fixed=True, roster=roster) == ""


def test_a_job_of_fixed_size_that_never_ran_takes_everybody() -> None:
    assert why_refuse(hello("c", job=FIXED), job_spec(FIXED), Roster(), None, changing=False) == ""


def test_a_job_of_fixed_size_below_its_size_takes_nodes() -> None:
    short = view(1, "a", members=(member("a"),))
    assert why_refuse(hello("c", job=FIXED), job_spec(FIXED), full_roster(), short, changing=False) == ""
