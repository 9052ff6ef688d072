"""Names the worker failure that started it, and decides whether it is charged to the restart budget.

Invariants (tests/unit/test_blame.py):
1. The first failure is the earliest by the controller's clock (arrival minus age); host clocks are never compared.
2. Failures while a member node is lost are its consequence: named, not charged.
3. The budget is `max_restarts` charges; the next one ends the job.
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from elastic_run.runtime.protocol.decision import Decision
from elastic_run.runtime.protocol.messages import Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedFailure:
    at: float
    """Controller's monotonic clock."""
    failure: Failure


def first_failure(failures: Sequence[TimedFailure]) -> Failure:
    """Return the earliest; ties go to the lowest rank. `failures` must not be empty."""
    return min(failures, key=lambda timed: (timed.at, timed.failure.rank)).failure


def describe(failure: Failure) -> str:
    """One sentence: rank, node, how it ended, last line of the traceback."""
    end = how_it_ended(failure.exit_code, failure.signal)
    last_line = failure.message.strip().splitlines()[-1].strip()[:200] if failure.message.strip() else ""
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
