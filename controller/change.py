"""A view change under way: PROPOSED -> PREPARED -> INSTALLED, or ABANDONED for a higher number."""

import dataclasses
from dataclasses import dataclass

from elastic_run.runtime.protocol.errors import InvariantViolated
from elastic_run.runtime.protocol.view import View, ViewStatus

_NEXT = {
    ViewStatus.PROPOSED: (ViewStatus.PREPARED, ViewStatus.ABANDONED),
    ViewStatus.PREPARED: (ViewStatus.PREPARED, ViewStatus.INSTALLED, ViewStatus.ABANDONED),
    ViewStatus.INSTALLED: (),
    ViewStatus.ABANDONED: (),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    view: View
    begun_at: float
    """Monotonic clock of this leader."""


def advance(view: View, status: ViewStatus) -> View:
    """Return the view moved to `status`. A move the table does not have is our mistake."""
    if status not in _NEXT[view.status]:
        raise InvariantViolated(f"view {view.number} can not go from {view.status} to {status}")
    return dataclasses.replace(view, status=status)
