"""Runs a benchmark's cases on several systems in turn, so that a drift of the machine hits them all alike.

Each case is measured in rounds; a round measures every system once, and the order turns around from round to round
(A B, B A, A B ...), so the n-th value of one system pairs with the n-th of another, taken next to it in time.

Invariants: 1. every system of a case has the same number of values; 2. a warm-up run's values are never seen;
3. no round beyond the first starts when the slowest round so far would overrun the time budget.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

QUICK_BUDGET_S = 50.0
FULL_BUDGET_S = 900.0


class BenchmarkError(Exception):
    """A measured system failed, hung or printed what cannot be read; the message says which and shows its end."""


class Kept:
    """What lives through all rounds (processes that take turns): made at first use, closed after the last round."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._found: dict[str, Any] = {}

    def get(self, key: str, make: Callable[[], contextlib.AbstractContextManager[T]]) -> T:
        """What `make` gave the first time `key` was asked for."""
        if key not in self._found:
            self._found[key] = self._stack.enter_context(make())
        found: T = self._found[key]
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What one measurement may know: how thorough to be, an empty directory of its own, what earlier ones left."""

    quick: bool
    warm_up: bool
    directory: Path
    kept: Kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One thing measured on each of `systems` (baseline first): `run(system, context)` gives a value per metric.

    A case that is not `quick` is left out of quick runs.
    """

    name: str
    systems: tuple[str, ...]
    units: Mapping[str, str]
    run: Callable[[str, Context], Mapping[str, float]]
    quick: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A bound on the paired ratio `over` / `under` of a metric, or without `under` on the median of `over` itself."""

    metric: str
    over: str
    under: str | None = None
    at_least: float | None = None
    at_most: float | None = None

    def is_met(self, value: float) -> bool:
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A named group of cases; metrics are unique over its cases.

    `targets`: what the result is held against. `absent`: systems that may be missing, each with a function that says
    why it cannot run here (None: it can); those are left out and the reason is part of the result. `table`: how to
    print the document (None: one line per metric and system). `budget_s`: for a full run (None: FULL_BUDGET_S).
    """

    name: str
    summary: str
    cases: tuple[Case, ...]
    rounds: int
    rounds_quick: int
    warm_up_quick: bool
    conditions: Callable[[bool], Mapping[str, Any]]
    targets: tuple[Target, ...] = ()
    absent: Mapping[str, Callable[[], str | None]] = field(default_factory=dict)
    table: Callable[[Mapping[str, Any]], str] | None = None
    budget_s: float | None = None

    @property
    def systems(self) -> tuple[str, ...]:
        """Every system of any case, in order of first mention."""
        return tuple(dict.fromkeys(system for case in self.cases for system in case.systems))


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """The values of one metric: per system, one value per round, in the order of the rounds."""

    metric: str
    unit: str
    values: Mapping[str, tuple[float, ...]]


def order_of(systems: Sequence[str], round_index: int) -> tuple[str, ...]:
    """The order of the systems in a round: A B, B A, A B ..."""
    return tuple(systems) if round_index % 2 == 0 else tuple(reversed(systems))


def measure(
    benchmark: Benchmark, *, systems: Sequence[str], quick: bool, directory: Path, say: Callable[[str], None]
) -> list[Series]:
    """All rounds of all cases that concern `systems`. Raises BenchmarkError."""
    with contextlib.ExitStack() as stack:
        return _measure(benchmark, systems=systems, quick=quick, directory=directory, say=say, kept=Kept(stack))


def _measure(
    benchmark: Benchmark,
    *,
    systems: Sequence[str],
    quick: bool,
    directory: Path,
    say: Callable[[str], None],
    kept: Kept,
) -> list[Series]:
    full_budget_s = FULL_BUDGET_S if benchmark.budget_s is None else benchmark.budget_s
    deadline_s = time.monotonic() + (QUICK_BUDGET_S if quick else full_budget_s)
    cases = [(case, [system for system in systems if system in case.systems]) for case in benchmark.cases]
    cases = [(case, chosen) for case, chosen in cases if chosen and (case.quick or not quick)]
    taken: dict[str, dict[str, list[float]]] = {
        metric: {system: [] for system in chosen} for case, chosen in cases for metric in case.units
    }
    runs = 0

    def run_once(case: Case, system: str, *, warm_up: bool) -> None:
        nonlocal runs
        runs += 1
        own = directory / f"{runs:04d}"
        own.mkdir()
        found = case.run(system, Context(quick=quick, warm_up=warm_up, directory=own, kept=kept))
        shown = "  ".join(f"{metric} {found[metric]:.4g} {unit}" for metric, unit in case.units.items())
        say(f"{case.name}: {system}{' (warm-up, discarded)' if warm_up else ''}: {shown}")
        if not warm_up:
            for metric in case.units:
                taken[metric][system].append(found[metric])

    if benchmark.warm_up_quick or not quick:
        for case, chosen in cases:
            for system in chosen:
                run_once(case, system, warm_up=True)
    slowest_round_s = 0.0
    for index in range(benchmark.rounds_quick if quick else benchmark.rounds):
        started_s = time.monotonic()
        if index > 0 and started_s + slowest_round_s > deadline_s:
            say(f"stopped after {index} rounds: another would overrun the time budget")
            break
        for case, chosen in cases:
            for system in order_of(chosen, index):
                run_once(case, system, warm_up=False)
        slowest_round_s = max(slowest_round_s, time.monotonic() - started_s)
    return [
        Series(metric=metric, unit=unit, values={system: tuple(taken[metric][system]) for system in chosen})
        for case, chosen in cases
        for metric, unit in case.units.items()
    ]
