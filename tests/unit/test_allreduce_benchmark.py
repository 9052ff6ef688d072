"""The arithmetic of the all-reduce and fault benchmarks: which calls count, which gaps count, targets, table."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

# benchmarks/ stands beside the package and is never installed.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import allreduce, allreduce_table, collective_faults, report
from benchmarks.harness import BenchmarkError, Kept, Series, Target
from benchmarks.scripts import crew_pattern
from benchmarks.systems import ELASTIC, ELASTIC_EXACT, ELASTIC_RING, ELASTIC_TCP, GLOO

METRIC = "4_workers_fp32_16MB_ms"
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SALTS = st.integers(0, 100)


def document_of(*series: Series) -> dict[str, Any]:
    conditions = {**allreduce.conditions(True), "left_out": {"pccl": "not here"}}
    return report.document(allreduce.BENCHMARK, series=series, machine={}, conditions=conditions)


def test_a_call_takes_as_long_as_its_slowest_member_and_the_first_of_a_batch_does_not_count() -> None:
    warm_up = [9.0, 9.0, 9.0]
    found = [[warm_up, [5.0, 1.0, 2.0]], [warm_up, [6.0, 3.0, 1.0]]]
    assert allreduce.slowest_calls_s(found) == [3.0, 2.0]


def test_the_only_call_of_a_batch_counts() -> None:
    assert allreduce.slowest_calls_s([[[9.0], [1.0], [4.0]], [[9.0], [2.0], [3.0]]]) == [2.0, 4.0]


def test_groups_of_a_crew_share_no_member() -> None:
    groups = [allreduce.members_of(workers) for workers in allreduce.WORKER_COUNTS]
    assert [len(group) for group in groups] == list(allreduce.WORKER_COUNTS)
    assert sorted(member for group in groups for member in group) == list(range(sum(allreduce.WORKER_COUNTS)))


@given(DTYPES, st.integers(1, 5), st.integers(1, 30), SALTS)
def test_a_sum_is_right_and_any_changed_element_is_seen(dtype: torch.dtype, workers: int, rows: int, salt: int) -> None:
    total = torch.zeros(rows * crew_pattern.COLUMNS, dtype=dtype)
    part = torch.empty_like(total)
    for rank in range(workers):
        crew_pattern.fill(part, rank, salt)
        assert crew_pattern.is_part(part, rank, salt)
        total += part
    assert crew_pattern.is_sum(total, workers, salt)
    assert not crew_pattern.is_sum(total, workers, salt + 1)
    total[rows * 7 % len(total)] += 1
    assert not crew_pattern.is_sum(total, workers, salt)


def test_parts_of_different_ranks_and_places_differ() -> None:
    one, other = torch.empty(4096), torch.empty(4096)
    crew_pattern.fill(one, rank=0, salt=0)
    crew_pattern.fill(other, rank=1, salt=0)
    assert not crew_pattern.is_part(other, rank=0, salt=0)
    assert not crew_pattern.is_sum(one.roll(crew_pattern.COLUMNS), workers=1, salt=0)


def test_gaps_are_chosen_by_the_time_they_end_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collective_faults, "LOOP_WARM_UP", 1)
    done_ns = [0, 100, 110, 130, 160, 165]
    assert collective_faults.longest_gap_ns(done_ns) == 30
    assert collective_faults.longest_gap_ns(done_ns, until_ns=160) == 20
    assert collective_faults.longest_gap_ns(done_ns, since_ns=161) == 5
    with pytest.raises(BenchmarkError):
        collective_faults.longest_gap_ns(done_ns, since_ns=1000)


def test_a_pause_that_begins_before_and_ends_after_counts_as_after() -> None:
    done_ns = [*range(0, 100 * 30, 100), 9000]
    assert collective_faults.longest_gap_ns(done_ns, since_ns=5000) == 9000 - 2900


def test_targets_are_judged_on_the_median_of_paired_ratios() -> None:
    values = {GLOO: (50.0, 26.0, 10.0), ELASTIC: (10.0, 10.0, 10.0)}
    document = document_of(Series(metric=METRIC, unit="ms", values=values))
    (found,) = document["targets"]
    assert found == {"name": f"{METRIC}: gloo / elastic", "value": 2.6, "at_least": 2.5, "met": True}
    assert document["ratios"][found["name"]] == 2.6


def test_every_promise_of_one_size_has_its_target() -> None:
    values = {GLOO: (26.0,), ELASTIC: (10.0,), ELASTIC_TCP: (25.0,), ELASTIC_RING: (10.0,), ELASTIC_EXACT: (14.0,)}
    document = document_of(Series(metric=METRIC, unit="ms", values=values))
    assert {target["name"].removeprefix(f"{METRIC}: "): target["met"] for target in document["targets"]} == {
        "gloo / elastic": True,
        "gloo / elastic-tcp": False,
        "elastic-exact / elastic-ring": False,
    }


def test_a_target_without_a_second_system_bounds_the_median() -> None:
    target = Target(metric="pause", over="a", at_most=2.0)
    assert target.is_met(2.0) and not target.is_met(2.1)
    benchmark = collective_faults.BENCHMARK
    series = Series(metric=collective_faults.JOIN_METRIC, unit="ms", values={"elastic-mesh": (5.0, 30.0, 6.0)})
    document = report.document(benchmark, series=[series], machine={}, conditions={})
    (found,) = document["targets"]
    assert (found["value"], found["at_most"], found["met"]) == (6.0, 20.0, True)
    assert report.table(document).splitlines()[-1].startswith("met")


def test_table_shows_bandwidth_speed_up_target_and_what_was_left_out() -> None:
    values = {GLOO: (30.0,), ELASTIC: (10.0,)}
    lines = allreduce_table.table(document_of(Series(metric=METRIC, unit="ms", values=values))).splitlines()
    assert lines[2].split() == ["4", "fp32", "16MB", "gloo", "1", "30.000", "30.000", "30.000", "0.84"]
    assert lines[3].split()[3:] == ["elastic", "1", "10.000", "10.000", "10.000", "2.52", "3.00", ">=", "2.5", "met"]
    assert lines[-1] == "left out: pccl: not here"


def test_what_is_kept_is_made_once_and_closed_in_reverse() -> None:
    happened: list[str] = []

    @contextlib.contextmanager
    def made(name: str) -> Iterator[str]:
        happened.append(f"open {name}")
        yield name
        happened.append(f"close {name}")

    with contextlib.ExitStack() as stack:
        kept = Kept(stack)
        assert [kept.get(name, lambda name=name: made(name)) for name in "aba"] == ["a", "b", "a"]
    assert happened == ["open a", "open b", "close b", "close a"]
