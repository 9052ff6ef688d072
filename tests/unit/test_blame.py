"""Which failure started it, and what it costs."""

import pytest
from builders import failure

from elastic_run.controller import blame
from elastic_run.controller.blame import FAILURES_KEPT_MAX, Failures, TimedFailure, first_failure


def test_the_earliest_by_age_is_the_first_whatever_the_order_of_arrival() -> None:
    failures = Failures()
    failures.add(failure(rank=1, age_s=0.1), now=10.0)
    failures.add(failure(rank=2, age_s=5.0), now=10.5)
    failures.add(failure(rank=3, age_s=0.0), now=10.0)
    assert failures.first.rank == 2
    assert failures.heard_since == 10.0


def test_ties_go_to_the_lowest_rank() -> None:
    at_once = [TimedFailure(at=1.0, failure=failure(rank)) for rank in (3, 1, 2)]
    assert first_failure(at_once).rank == 1


def test_an_age_from_the_future_counts_as_now() -> None:
    failures = Failures()
    failures.add(failure(rank=0, age_s=-100.0), now=10.0)
    failures.add(failure(rank=1, age_s=1.0), now=10.0)
    assert failures.first.rank == 1


def test_a_rank_is_kept_once_as_first_heard() -> None:
    failures = Failures()
    failures.add(failure(rank=0, message="first"), now=1.0)
    failures.add(failure(rank=0, message="again", age_s=50.0), now=2.0)
    assert len(failures) == 1 and failures.first.message == "first"


def test_beyond_the_bound_the_earliest_are_kept() -> None:
    failures = Failures()
    for rank in range(FAILURES_KEPT_MAX * 3):
        failures.add(failure(rank, age_s=0.01 * rank), now=10.0)
    assert len(failures) == FAILURES_KEPT_MAX
    assert failures.first.rank == FAILURES_KEPT_MAX * 3 - 1


def test_cleared_failures_are_gone_and_the_clock_starts_anew() -> None:
    failures = Failures()
    failures.add(failure(node="b"), now=1.0)
    assert failures.nodes == {"b"}
    failures.clear()
    assert len(failures) == 0 and failures.heard_since is None and not failures.nodes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"exit_code": 3}, "rank 0 on node a (pid 1000) exited with code 3"),
        ({"exit_code": None, "signal": 11}, "rank 0 on node a (pid 1000) was killed by SIGSEGV"),
        ({"exit_code": None, "signal": 64}, "was killed by SIGRTMAX"),
        ({"exit_code": None, "signal": 999}, "was killed by signal 999"),
        ({"exit_code": None, "signal": None}, "could not be started"),
        ({"message": "Traceback\n  x\nValueError: bad\n"}, "exited with code 1: ValueError: bad"),
        ({"message": " \n "}, "exited with code 1"),
        (
            {"message": "exited with code 1; nothing was recorded"},
            "(pid 1000) exited with code 1; nothing was recorded",
        ),
    ],
)
def test_a_failure_is_told_in_one_sentence(changes: dict[str, object], says: str) -> None:
    sentence = blame.describe(failure(**changes))  # type: ignore[arg-type]
    assert sentence.endswith(says) or sentence == says
    assert "\n" not in sentence


def test_an_endless_message_is_cut() -> None:
    assert len(blame.describe(failure(message="x" * 10_000))) < 300


@pytest.mark.parametrize(
    ("used", "allowed", "value", "says"),
    [
        (0, 1, True, "restart 1 of 1"),
        (1, 3, True, "restart 2 of 3"),
        (1, 1, False, "all 1 restarts are used"),
        (3, 3, False, "all 3 restarts are used"),
        (0, 0, False, "no restart is allowed (--max-restarts=0)"),
    ],
)
def test_the_budget_is_exactly_max_restarts(used: int, allowed: int, value: bool, says: str) -> None:
    decision = blame.may_restart(restarts_used=used, max_restarts=allowed, culprit=failure())
    assert decision.value is value
    assert says in decision.reason and "rank 0 on node a" in decision.reason
