"""The benchmark harness' arithmetic: order of runs, pairing, document and table."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

# benchmarks/ stands beside the package and is never installed.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import harness, report
from benchmarks.harness import Benchmark, BenchmarkError, Case, Context, Series, measure, order_of
from benchmarks.registry import BENCHMARKS
from benchmarks.systems import MODULE_OF_SYSTEM

POSITIVE = st.floats(min_value=1e-6, max_value=1e6)


class Recorder:
    """A measured thing that needs no process: it notes who ran when, and answers with the number of the run."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, bool]] = []

    def run(self, system: str, context: Context) -> Mapping[str, float]:
        assert context.directory.is_dir()
        assert not list(context.directory.iterdir())
        self.runs.append((system, context.warm_up))
        return {"time_s": float(len(self.runs))}


def benchmark_of(recorder: Recorder, *, rounds: int = 3, warm_up_quick: bool = True) -> Benchmark:
    case = Case(name="only", systems=("a", "b"), units={"time_s": "s"}, run=recorder.run)
    return Benchmark(
        name="recorded",
        summary="",
        cases=(case,),
        rounds=rounds,
        rounds_quick=1,
        warm_up_quick=warm_up_quick,
        conditions=lambda quick: {},
    )


def document_of(*series: Series) -> dict[str, Any]:
    return report.document(benchmark_of(Recorder()), series=series, machine={"cores": 2}, conditions={"quick": True})


def test_systems_are_interleaved_and_warm_up_runs_are_discarded(tmp_path: Path) -> None:
    recorder = Recorder()
    (series,) = measure(
        benchmark_of(recorder), systems=("a", "b"), quick=False, directory=tmp_path, say=lambda line: None
    )
    assert [system for system, _ in recorder.runs] == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert [warm_up for _, warm_up in recorder.runs] == [True, True] + 6 * [False]
    assert series.values == {"a": (3.0, 6.0, 7.0), "b": (4.0, 5.0, 8.0)}


def test_quick_run_without_warm_up_takes_one_round(tmp_path: Path) -> None:
    recorder = Recorder()
    measure(
        benchmark_of(recorder, warm_up_quick=False),
        systems=("a", "b"),
        quick=True,
        directory=tmp_path,
        say=lambda line: None,
    )
    assert recorder.runs == [("a", False), ("b", False)]


def test_only_the_named_systems_run(tmp_path: Path) -> None:
    recorder = Recorder()
    (series,) = measure(benchmark_of(recorder), systems=("b",), quick=True, directory=tmp_path, say=lambda line: None)
    assert list(series.values) == ["b"]
    assert document_of(series)["ratios"] == {}


def test_the_first_named_system_is_the_baseline() -> None:
    document = document_of(Series(metric="time_s", unit="s", values={"b": (2.0,), "a": (1.0,)}))
    assert document["ratios"] == {"time_s: a / b": 0.5}


def test_no_round_starts_that_would_overrun_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "FULL_BUDGET_S", 0.0)
    recorder = Recorder()
    said: list[str] = []
    (series,) = measure(benchmark_of(recorder), systems=("a", "b"), quick=False, directory=tmp_path, say=said.append)
    assert {system: len(values) for system, values in series.values.items()} == {"a": 1, "b": 1}
    assert said[-1].startswith("stopped after 1 rounds")


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, unique=True), st.integers(0, 50))
def test_two_rounds_in_turn_mirror_each_other(systems: list[str], index: int) -> None:
    assert order_of(systems, index) == tuple(reversed(order_of(systems, index + 1)))
    assert sorted(order_of(systems, index)) == sorted(systems)


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=20))
def test_ratios_pair_by_round_and_undo_when_swapped(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    forth, back = report.paired_ratios(ours, theirs), report.paired_ratios(theirs, ours)
    assert [one * other for one, other in zip(forth, back, strict=True)] == pytest.approx([1.0] * len(pairs))


def test_ratio_is_the_median_of_pairs_and_not_the_ratio_of_medians() -> None:
    series = Series(metric="time_s", unit="s", values={"a": (1.0, 2.0, 4.0), "b": (3.0, 2.0, 4.0)})
    document = document_of(series)
    assert document["ratios"] == {"time_s: b / a": 1.0}
    assert document["differences"] == {"time_s: b - a": 0.0}
    assert document["results"]["b"]["time_s"]["median"] / document["results"]["a"]["time_s"]["median"] == 1.5


def test_a_baseline_of_zero_has_a_difference_and_no_ratio() -> None:
    document = document_of(Series(metric="idle", unit="cores", values={"a": (0.0,), "b": (0.5,)}))
    assert document["ratios"] == {}
    assert document["differences"] == {"idle: b - a": 0.5}


def test_pairs_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        report.paired_ratios([1.0], [1.0, 2.0])


def test_summary_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        report.summary([])


@given(st.lists(POSITIVE, min_size=1, max_size=20))
def test_document_survives_json_with_every_promised_key(values: list[float]) -> None:
    document = document_of(Series(metric="time_s", unit="s", values={"a": tuple(values), "b": tuple(values)}))
    read = json.loads(json.dumps(document))
    assert read == document
    assert set(read) == {"benchmark", "machine", "conditions", "results", "ratios", "differences"}
    found = read["results"]["a"]["time_s"]
    assert set(found) == {"n", "median", "min", "max", "unit"}
    assert found["n"] == len(values)
    assert found["min"] <= found["median"] <= found["max"]
    assert read["ratios"]["time_s: b / a"] == 1.0


def test_table_is_aligned_and_names_every_metric_system_and_ratio() -> None:
    series = Series(metric="time_s", unit="s", values={"a": (1.0, 2.0), "long-name": (2.0, 4.0)})
    lines = report.table(document_of(series)).splitlines()
    assert lines[0].split() == ["metric", "system", "n", "median", "min", "max", "unit"]
    assert lines[2].split() == ["time_s", "a", "2", "1.5", "1", "2", "s"]
    assert lines[3].split() == ["time_s", "long-name", "2", "3", "2", "4", "s"]
    assert lines[2].index("1.5") == lines[0].index("median")
    assert lines[4] == "time_s: long-name / a  =  2.0000 (median of paired ratios)"


def test_a_failed_run_ends_the_benchmark(tmp_path: Path) -> None:
    def fail(system: str, context: Context) -> Mapping[str, float]:
        raise BenchmarkError(f"{system} failed")

    case = Case(name="only", systems=("a",), units={"time_s": "s"}, run=fail)
    benchmark = Benchmark(
        name="failing",
        summary="",
        cases=(case,),
        rounds=1,
        rounds_quick=1,
        warm_up_quick=False,
        conditions=lambda quick: {},
    )
    with pytest.raises(BenchmarkError, match="a failed"):
        measure(benchmark, systems=("a",), quick=True, directory=tmp_path, say=lambda line: None)


def test_registered_benchmarks_are_distinct_and_every_system_can_be_started() -> None:
    names = [benchmark.name for benchmark in BENCHMARKS]
    assert len(set(names)) == len(names)
    for benchmark in BENCHMARKS:
        metrics = [metric for case in benchmark.cases for metric in case.units]
        assert len(set(metrics)) == len(metrics)
        assert set(benchmark.systems) <= set(MODULE_OF_SYSTEM)
