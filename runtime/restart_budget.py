"""Decides whether a process that died may be started again, and after what pause. Pure: the caller tells the time.

Invariants (tests/unit/test_restart_budget.py):
1. At most RESTARTS_MAX restarts within any WINDOW_S seconds; the pauses double from FIRST_PAUSE_S on.
2. A process that ran well for a whole window starts with the first pause again.
"""

RESTARTS_MAX = 5
WINDOW_S = 60.0
FIRST_PAUSE_S = 0.05
"""One death is met almost at once; the fifth waits 0.8 s, so a process that cannot live does not eat the machine."""


class RestartBudget:
    """Counts the restarts of one process."""

    def __init__(self) -> None:
        self._restarts: list[float] = []

    def next_pause_s(self, now: float) -> float | None:
        """Return the seconds to wait before the next start, or None when it died too often. `now` is monotonic."""
        self._restarts = [moment for moment in self._restarts if now - moment < WINDOW_S]
        if len(self._restarts) >= RESTARTS_MAX:
            return None
        pause_s: float = FIRST_PAUSE_S * 2.0 ** len(self._restarts)
        self._restarts.append(now)
        return pause_s
