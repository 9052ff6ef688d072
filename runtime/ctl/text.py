"""Tables and lines for people: plain text, aligned, times as local time, ages as "3 s ago". Pure.

Invariants (tests/unit/test_ctl_text.py):
1. What comes from a job, such as the message of a failure, puts no control character on the terminal and no second
   line into a table.
Not here: JSON (cli.py), where it all comes from (client.py).
"""

import datetime
from collections.abc import Sequence

from elastic_run.runtime.ctl.picture import FROM_STORE, JobPicture
from elastic_run.runtime.protocol.records import EventRecord
from elastic_run.runtime.protocol.view import View, ViewStatus

UNKNOWN = "-"
COLUMN_GAP = "  "
_AGES = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def status(job: JobPicture) -> str:
    """Return the answer to `elastic-ctl status`."""
    allowed = UNKNOWN if job.nodes_min is None else _range(job.nodes_min, job.nodes_max)
    rows = [
        ("job", f"{job.job_id}, {job.condition}" + (f": {job.reason}" if job.reason else "")),
        ("leader", _leader(job)),
        ("nodes", f"{sum(node.in_view for node in job.nodes)} in the view, {len(job.nodes)} known, {allowed} wanted"),
        ("view", f"{job.view}, {job.world_size} workers" if job.view else "none yet"),
        ("step", _step(job.step, job.step_rate_hz)),
        ("restarts", f"{job.restarts_used} of {_or_unknown(job.max_restarts)} used"),
        ("last event", job.last_event or UNKNOWN),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}{COLUMN_GAP}{_clean(text)}" for name, text in rows)


def nodes(job: JobPicture) -> str:
    """Return the answer to `elastic-ctl nodes`."""
    head = ("NODE", "CONDITION", "WORKERS", "PHASE", "VIEW", "STEP", "ADDRESS", "METRICS", "WHY")
    rows = [
        (
            node.node,
            node.condition,
            f"{_or_unknown(node.workers_alive)}/{node.nproc}",
            _or_unknown(node.phase),
            _or_unknown(node.view),
            _or_unknown(node.step),
            node.address,
            _or_unknown(node.metrics_port),
            node.reason,
        )
        for node in job.nodes
    ]
    return table(head, rows) if rows else "no node is known"


def views(found: Sequence[View], *, now: float) -> str:
    """Return the answer to `elastic-ctl views`; the current one is marked. `now`: unix seconds."""
    current = max((view.number for view in found if view.status is ViewStatus.INSTALLED), default=None)
    rows = [
        (
            f"{view.number}{' *' if view.number == current else ''}",
            str(view.status),
            str(len(view.members)),
            str(view.world_size),
            str(view.restart_count),
            age(now - view.proposed_at),
            view.reason,
        )
        for view in found
    ]
    return table(("VIEW", "STATUS", "NODES", "WORKERS", "RESTARTS", "PROPOSED", "WHY"), rows) if rows else "no view yet"


def events(found: Sequence[EventRecord], *, now: float) -> str:
    """Return the answer to `elastic-ctl events`. `now`: unix seconds."""
    rows = [(local_time(e.at), age(now - e.at), str(e.kind), e.message) for e in found]
    return table(("TIME", "AGE", "KIND", "MESSAGE"), rows) if rows else "no event yet"


def event_line(event: EventRecord) -> str:
    """Return one line of `elastic-ctl events --follow`."""
    return _clean(f"{local_time(event.at)}{COLUMN_GAP}{event.kind:<15}{COLUMN_GAP}{event.message}")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows under their heads, each column as wide as its widest cell; the last one is not filled up."""
    lines = [head, *([_clean(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
    padded = ((*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]) for line in lines)
    return "\n".join(COLUMN_GAP.join(line).rstrip() for line in padded)


def age(seconds: float) -> str:
    """Return "3 s ago" and the like; clocks of two hosts may disagree, so the future is "just now"."""
    for unit_s, name in _AGES:
        if seconds >= unit_s:
            return f"{int(seconds // unit_s)} {name} ago"
    return "just now"


def local_time(unix_s: float) -> str:
    """Return date and time of this machine's time zone, to the second."""
    try:
        return datetime.datetime.fromtimestamp(unix_s).isoformat(sep=" ", timespec="seconds")
    except (OverflowError, OSError, ValueError):  # no date of any calendar
        return f"{unix_s:g}"


def _leader(job: JobPicture) -> str:
    if job.source == FROM_STORE:
        name = f"{job.leader} is named in the store, but " if job.leader else ""
        return f"{name}no controller answers ({job.problem}); this is what the store holds"
    metrics = "" if job.leader_metrics_port is None else f", metrics on its port {job.leader_metrics_port}"
    return f"{_or_unknown(job.leader)}, fencing token {_or_unknown(job.fencing_token)}{metrics}"


def _step(step: int | None, rate_hz: float | None) -> str:
    if step is None:
        return UNKNOWN
    return f"{step}, {rate_hz:.3g} steps/s" if rate_hz else str(step)


def _range(low: int, high: int | None) -> str:
    return str(low) if low == high else f"{low} to {_or_unknown(high)}"


def _or_unknown(value: object) -> str:
    return UNKNOWN if value is None else str(value)


def _clean(text: str) -> str:
    """One printable line."""
    return "".join(letter if letter.isprintable() else " " if letter.isspace() else "?" for letter in text)
