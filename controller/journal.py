"""The job's event log: numbered entries for people, bounded, written in the transaction of what they tell.

Invariants:
1. Sequence numbers grow by one across leaders; entries older than EVENTS_MAX are deleted with the write of the new one
   (tests/unit/test_journal.py).
2. An entry is written with the last Persist of its moment, so never before what it tells, or in one of its own.
"""

from collections.abc import Sequence

from elastic_run.controller.actions import Action, Persist, Put
from elastic_run.runtime.protocol.records import EVENTS_MAX, EventKind, EventRecord, event_key

ENTRIES_PER_EVENT_MAX = 32
MESSAGE_CHARS_MAX = 2000


class Journal:
    def __init__(self, earlier: Sequence[EventRecord] = ()) -> None:
        self._sequence = earlier[-1].sequence if earlier else 0
        self._pending: list[EventRecord] = []
        self.last = earlier[-1].message if earlier else ""
        self.wall = 0.0
        """Unix seconds of the event being handled."""

    def note(self, kind: EventKind, message: str, *, node: str | None = None, view: int | None = None) -> None:
        self._sequence += 1
        self.last = message = message[:MESSAGE_CHARS_MAX]
        self._pending.append(
            EventRecord(sequence=self._sequence, at=self.wall, kind=kind, message=message, node=node, view=view)
        )

    def weave(self, actions: list[Action]) -> list[Action]:
        """Return the actions with the entries noted meanwhile made durable by the last Persist among them."""
        if not self._pending:
            return actions
        self._shorten()
        puts = tuple(Put(key=event_key(e.sequence), record=e, create=True) for e in self._pending)
        old = tuple(event_key(e.sequence - EVENTS_MAX) for e in self._pending if e.sequence > EVENTS_MAX)
        self._pending = []
        for i, action in reversed(tuple(enumerate(actions))):
            if isinstance(action, Persist):
                woven = Persist(puts=(*action.puts, *puts), deletes=(*action.deletes, *old))
                return [*actions[:i], woven, *actions[i + 1 :]]
        return [*actions, Persist(puts=puts, deletes=old)]  # no message has to wait for an entry

    def _shorten(self) -> None:
        """Keep one transaction within etcd's 128 operations when a whole rack goes at once."""
        surplus = len(self._pending) - ENTRIES_PER_EVENT_MAX
        if surplus > 0:
            del self._pending[ENTRIES_PER_EVENT_MAX:]
            self._sequence = self._pending[-1].sequence
            self.note(self._pending[-1].kind, f"and {surplus} more entries of the same moment")
