"""Names the worker failure that started it, and decides whether it is charged to the restart budget.

Invariants (tests/unit/test_blame.py):
1. The first failure is the earliest by the controller's clock (arrival minus age); host clocks are never compared.
2. Failures while a member node is lost are its consequence: named, not charged (core.py asks in that order).
3. The budget is `max_restarts` charges; the next one ends the job.
4. One failure per rank is kept, the first heard; of more than FAILURES_KEPT_MAX ranks, the earliest.
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from elastic_run.runtime.protocol.decision import Decision
from elastic_run.runtime.protocol.ids import NodeId
from elastic_run.runtime.protocol.messages import Failure

FAILURES_KEPT_MAX = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedFailure:
    at: float
    """Controller's monotonic clock."""
    failure: Failure


class Failures:
    """What is known of the installed view's failures and not answered yet."""

    def __init__(self) -> None:
        self._kept: list[TimedFailure] = []
        self.heard_since: float | None = None
        """When the first of them was heard, however long before it happened."""

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def first(self) -> Failure:
        return first_failure(self._kept)

    @property
    def nodes(self) -> frozenset[NodeId]:
        return frozenset(timed.failure.node for timed in self._kept)

    def add(self, failure: Failure, now: float) -> None:
        if any(timed.failure.rank == failure.rank for timed in self._kept):
            return
        if self.heard_since is None:
            self.heard_since = now
        self._kept.append(TimedFailure(at=now - max(0.0, failure.age_s), failure=failure))
        if len(self._kept) > FAILURES_KEPT_MAX:
            self._kept.remove(max(self._kept, key=lambda timed: (timed.at, timed.failure.rank)))

    def clear(self) -> None:
        self._kept, self.heard_since = [], None


def first_failure(failures: Sequence[TimedFailure]) -> Failure:
    """Return the earliest; ties go to the lowest rank. `failures` must not be empty."""
    return min(failures, key=lambda timed: (timed.at, timed.failure.rank)).failure


def describe(failure: Failure) -> str:
    """One sentence: rank, node, how it ended, last line of the traceback."""
    end = how_it_ended(failure.exit_code, failure.signal)
    last_line = failure.message.strip().splitlines()[-1].strip()[:200] if failure.message.strip() else ""
    if last_line.startswith(end):  # a failure without a traceback says no more than how it ended
        end, last_line = last_line, ""
    detail = f": {last_line}" if last_line else ""
    return f"rank {failure.rank} on node {failure.node} (pid {failure.pid}) {end}{detail}"


def how_it_ended(exit_code: int | None, signal_number: int | None) -> str:
    if signal_number is not None:
        try:
            return f"was killed by {signal.Signals(signal_number).name}"
        except ValueError:
            return f"was killed by signal {signal_number}"
    return f"exited with code {exit_code}" if exit_code is not None else "could not be started"


def may_restart(*, restarts_used: int, max_restarts: int, culprit: Failure) -> Decision[bool]:
    """Say whether the job may restart its workers once more."""
    story = describe(culprit)
    if restarts_used < max_restarts:
        return Decision(True, f"{story}; restart {restarts_used + 1} of {max_restarts}")
    if max_restarts == 0:
        return Decision(False, f"{story}; no restart is allowed (--max-restarts=0)")
    return Decision(False, f"{story}; all {max_restarts} restarts are used")
