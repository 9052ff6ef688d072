"""Views and leaders: numbers and tokens only grow, a view is installed only after it was proposed and prepared."""

import itertools
from collections.abc import Sequence

from elastic_run.chaos.checkers.verdict import Verdict
from elastic_run.chaos.history import CurrentSeen, Entry, EventSeen, LeaderSeen, ViewSeen
from elastic_run.runtime.protocol.view import ViewStatus

_BEFORE = {
    ViewStatus.PROPOSED: (None,),
    ViewStatus.PREPARED: (ViewStatus.PROPOSED, ViewStatus.PREPARED),
    ViewStatus.INSTALLED: (ViewStatus.PREPARED,),
    ViewStatus.ABANDONED: (ViewStatus.PROPOSED, ViewStatus.PREPARED),
}


def views_only_grow(history: Sequence[Entry]) -> Verdict:
    """Every view is proposed under a number above all others, goes through its states in order, with its members."""
    problems: list[str] = []
    newest: dict[int, ViewSeen] = {}
    highest = 0
    for entry in history:
        if not isinstance(entry, ViewSeen):
            continue
        before = newest.get(entry.number)
        state = ViewStatus(before.status) if before is not None else None
        if state not in _BEFORE[ViewStatus(entry.status)]:
            problems.append(f"view {entry.number} became {entry.status} after {state or 'nothing'}")
        if before is None and entry.number <= highest:
            problems.append(f"view {entry.number} appeared after view {highest}")
        if before is not None and before.members != entry.members:
            problems.append(f"view {entry.number} had members {before.members}, then {entry.members}")
        newest[entry.number] = entry
        highest = max(highest, entry.number)
    return Verdict(
        claim="views only grow, each proposed and prepared before it is installed",
        problems=tuple(problems),
        checked=f"{len(newest)} views",
    )


def current_view_only_grows(history: Sequence[Entry]) -> Verdict:
    """The number by which agents fence themselves names installed views, upwards."""
    problems: list[str] = []
    installed = {e.number for e in history if isinstance(e, ViewSeen) and e.status == ViewStatus.INSTALLED}
    numbers = [entry.number for entry in history if isinstance(entry, CurrentSeen)]
    for before, after in itertools.pairwise(numbers):
        if after <= before:
            problems.append(f"the current view went from {before} to {after}")
    problems += [
        f"view {number} became current and was never installed" for number in numbers if number not in installed
    ]
    return Verdict(
        claim="the current view only grows, and was installed",
        problems=tuple(problems),
        checked=f"{len(numbers)} installations",
    )


def tokens_only_grow(history: Sequence[Entry]) -> Verdict:
    """Each leader's fencing token is above its predecessor's."""
    seen = [entry for entry in history if isinstance(entry, LeaderSeen)]
    problems = [
        f"{after.candidate} leads with token {after.token} after {before.candidate} with {before.token}"
        for before, after in itertools.pairwise(seen)
        if after.token <= before.token
    ]
    return Verdict(claim="fencing tokens only grow", problems=tuple(problems), checked=f"{len(seen)} terms")


def no_event_is_lost(history: Sequence[Entry]) -> Verdict:
    """The event log counts by one, whoever leads."""
    numbers = [entry.sequence for entry in history if isinstance(entry, EventSeen)]
    problems = [
        f"event {after} follows event {before}" for before, after in itertools.pairwise(numbers) if after != before + 1
    ]
    if numbers and numbers[0] != 1:
        problems.append(f"the first event is number {numbers[0]}")
    return Verdict(claim="the event log has no gap", problems=tuple(problems), checked=f"{len(numbers)} events")
