"""Writes into the history what the system shows: the job's keys in etcd, and the steps of the workload.

Invariants:
1. Every change of a key is seen once and in order, also across an outage of etcd: the watch goes on where it was.
2. A step is taken once its line is complete.
"""

import asyncio
import json
import logging
import time
from contextlib import aclosing
from pathlib import Path

from elastic_run.chaos.history import (
    CurrentSeen,
    Entry,
    EventSeen,
    History,
    LeaderSeen,
    ResultSeen,
    StepDone,
    ViewSeen,
)
from elastic_run.runtime.edge.store import EventKind, KeyValue, Snapshot, Store, follow
from elastic_run.runtime.protocol import codec
from elastic_run.runtime.protocol.errors import CodecError, StoreError
from elastic_run.runtime.protocol.records import (
    CURRENT_KEY,
    EVENTS_PREFIX,
    LEADER_KEY,
    RESULT_KEY,
    VIEWS_PREFIX,
    CurrentView,
    EventRecord,
    JobResult,
    LeaderRecord,
)
from elastic_run.runtime.protocol.view import View

PATIENCE_S = 300.0
LIST_RETRY_S = 0.5
LIST_TRIES_MAX = 60
POLL_S = 0.1
LINE_BYTES_MAX = 65536

log = logging.getLogger("elastic_run.chaos")


class Observer:
    """Both loops run until cancelled."""

    def __init__(self, store: Store, steps_file: Path, history: History) -> None:
        self._store, self._steps_file, self._history = store, steps_file, history
        self.leader = ""
        """Candidate that leads, or led last."""
        self.newest: StepDone | None = None
        self._offset = 0

    async def watch_keys(self) -> None:
        """Follow the job's keys. Raises StoreError when etcd is away for too long."""
        for tries_left in reversed(range(LIST_TRIES_MAX)):
            try:
                async with aclosing(follow(self._store, "", patience_s=PATIENCE_S)) as changes:
                    async for change in changes:
                        if isinstance(change, Snapshot):
                            found = change.items
                        else:
                            found = tuple(e.kv for e in change.events if e.kind is EventKind.PUT)
                        for kv in found:
                            self._key(kv)
            except StoreError as error:
                if not tries_left or self.leader:  # once begun, a gap could not be told from a lost change
                    raise
                log.info("etcd does not answer yet: %s", error)
            await asyncio.sleep(LIST_RETRY_S)

    async def watch_steps(self) -> None:
        """Follow the file of steps."""
        while True:
            self.read_steps()
            await asyncio.sleep(POLL_S)

    def read_steps(self) -> None:
        """Take the lines that came since."""
        if not self._steps_file.exists():
            return
        with self._steps_file.open("rb") as file:
            file.seek(self._offset)
            while (line := file.readline(LINE_BYTES_MAX)).endswith(b"\n"):
                self._offset += len(line)
                self.newest = StepDone(**json.loads(line))
                self._history.add(self.newest)

    def _key(self, kv: KeyValue) -> None:
        entry = _entry(kv, time.monotonic())
        if entry is None:
            return
        if isinstance(entry, LeaderSeen):
            self.leader = entry.candidate
        self._history.add(entry)


def _entry(kv: KeyValue, at_s: float) -> Entry | None:
    """What a key says; None when it is of no interest. Raises CodecError for what is not the system's."""
    key, value = kv.key, kv.value
    if key == LEADER_KEY:
        candidate = codec.decode(LeaderRecord, value, where=key).candidate
        return LeaderSeen(at_s=at_s, candidate=candidate, token=kv.create_revision)
    if key == CURRENT_KEY:
        return CurrentSeen(at_s=at_s, number=codec.decode(CurrentView, value, where=key).number)
    if key == RESULT_KEY:
        result = codec.decode(JobResult, value, where=key)
        return ResultSeen(at_s=at_s, state=str(result.state), message=result.message)
    if key.startswith(EVENTS_PREFIX):
        event = codec.decode(EventRecord, value, where=key)
        return EventSeen(at_s=at_s, sequence=event.sequence, kind=str(event.kind), message=event.message)
    if key.startswith(VIEWS_PREFIX):
        view = codec.decode(View, value, where=key)
        return ViewSeen(
            at_s=at_s,
            number=view.number,
            status=str(view.status),
            members=tuple(member.node for member in view.members),
            restart_count=view.restart_count,
        )
    if not key.startswith("nodes/") and key != "spec":
        raise CodecError(f"{key} is not a key of a job")
    return None
