"""What a person reads after a campaign: the faults with their recovery, and the verdicts."""

import itertools
from collections.abc import Sequence

from elastic_run.chaos.checkers.verdict import Verdict
from elastic_run.chaos.history import Entry, FaultBegan, HealingBegan, StepDone

HEADER = ("at", "fault", "hit", "next step", "longest pause")
OVERLAP_S_MIN = 0.5
"""A pause that begins later than this before the next fault is counted there."""


def fault_table(history: Sequence[Entry]) -> list[str]:
    """One line per fault. The longest pause between two steps is looked for until the next fault."""
    began_s = history[0].at_s if history else 0.0
    faults = [entry for entry in history if isinstance(entry, FaultBegan)]
    steps = [entry.at_s for entry in history if isinstance(entry, StepDone)]
    end_s = next((entry.at_s for entry in history if isinstance(entry, HealingBegan)), history[-1].at_s)
    untils = [*(fault.at_s for fault in faults[1:]), end_s]
    rows: list[tuple[str, ...]] = [HEADER]
    for fault, until_s in zip(faults, untils, strict=False):
        following = next((at_s - fault.at_s for at_s in steps if at_s > fault.at_s), None)
        pause = _longest_pause_s(steps, fault.at_s, until_s)
        rows.append(
            (
                f"{fault.at_s - began_s:.1f} s",
                f"{fault.action} {fault.victim}",
                fault.what or "nobody was there to hit",
                "none" if following is None else f"{following:.2f} s",
                f"{pause:.2f} s",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def verdict_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """One line per claim, the problems below."""
    lines = []
    for verdict in verdicts:
        lines.append(f"{'ok  ' if verdict.held else 'FAIL'}  {verdict.claim} ({verdict.checked})")
        lines += [f"        {problem}" for problem in verdict.problems[:10]]
        if len(verdict.problems) > 10:
            lines.append(f"        and {len(verdict.problems) - 10} more")
    return lines


def _longest_pause_s(steps: Sequence[float], from_s: float, until_s: float) -> float:
    """The longest time between two steps, of those that overlap the span; not one the next fault has just begun."""
    pauses = [
        after - before
        for before, after in itertools.pairwise(steps)
        if after > from_s and before < until_s
        if before <= from_s or after <= until_s or until_s - before >= OVERLAP_S_MIN
    ]
    return max(pauses, default=0.0)
