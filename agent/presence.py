"""This node's presence in the store: its leased record, and what the store says about leader and current view.

Invariants (tests/integration/test_agent_presence.py):
1. The record stands while the lease is held; a lost lease is replaced by a new one as soon as the store answers.
2. A store that is away, or comes back without its history, stops nothing: both loops go on until cancelled.
Not here: what follows from a newer view (core.py).
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass

from elastic_run.runtime.edge.lease import LeaseKeeper
from elastic_run.runtime.edge.log import OutageLog
from elastic_run.runtime.edge.store import EventKind, Put, Snapshot, Store, follow
from elastic_run.runtime.protocol import codec
from elastic_run.runtime.protocol.errors import CodecError, StoreError
from elastic_run.runtime.protocol.ids import ViewNumber
from elastic_run.runtime.protocol.records import (
    CURRENT_KEY,
    LEADER_KEY,
    RESULT_KEY,
    SPEC_KEY,
    SYNC_PREFIX,
    CurrentView,
    JobResult,
    JobSpec,
    LeaderRecord,
    NodeRecord,
    node_key,
)

RETRY_S = 0.5
REVOKE_DEADLINE_S = 1.0

log = logging.getLogger("elastic_run.agent")


class Presence:
    """Holds the node's record while `run()` runs; `leave()` takes it away at once."""

    def __init__(self, store: Store, record: NodeRecord, lease_ttl_s: int) -> None:
        self.record = record
        """May be replaced before run()."""
        self._store, self._ttl_s = store, lease_ttl_s
        self._keeper: LeaseKeeper | None = None
        self._outage = OutageLog(log, "the store")

    @property
    def held(self) -> bool:
        return self._keeper is not None and self._keeper.held()

    async def run(self) -> None:
        while True:
            try:
                await self._hold_once()
            except StoreError as error:
                self._outage.failed(time.monotonic(), error)
            await asyncio.sleep(RETRY_S)

    async def leave(self) -> None:
        """Give the lease back, so that nobody has to wait for its end."""
        if self._keeper is None:
            return
        try:
            await self._store.lease_revoke(self._keeper.lease_id, deadline_s=REVOKE_DEADLINE_S)
        except StoreError as error:
            log.info("the lease runs out by itself: %s", error)

    async def _hold_once(self) -> None:
        granted_at = time.monotonic()
        lease_id = await self._store.lease_grant(self._ttl_s)
        async with LeaseKeeper(self._store, lease_id, self._ttl_s, granted_at_s=granted_at) as keeper:
            self._keeper = keeper
            self._outage.worked(time.monotonic())
            key, value = node_key(self.record.node), codec.encode(self.record)
            await self._store.txn((), (Put(key=key, value=value, lease_id=lease_id),))
            await keeper.lost.wait()
        log.info("this node's lease is lost (%s); a new one is asked for", keeper.reason)


async def read_token(store: Store) -> str | None:
    """Return the job's join token, None while no leader has written the spec."""
    found = await store.get(SPEC_KEY)
    return None if found is None else codec.decode(JobSpec, found.value, where=SPEC_KEY).token


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncListener:
    """Who wants to know what of the store's shared state."""

    on_leader: Callable[[str], None]
    on_current: Callable[[ViewNumber], None]
    on_result: Callable[[JobResult], None]

    def take(self, key: str, value: bytes) -> None:
        if key == LEADER_KEY:
            self.on_leader(codec.decode(LeaderRecord, value, where=key).address)
        elif key == CURRENT_KEY:
            self.on_current(codec.decode(CurrentView, value, where=key).number)
        elif key == RESULT_KEY:
            self.on_result(codec.decode(JobResult, value, where=key))


async def follow_sync(store: Store, listener: SyncListener) -> None:
    """Tell of every leader, every installed view and the job's end the store knows, until cancelled."""
    while True:
        try:
            async with aclosing(follow(store, SYNC_PREFIX)) as changes:
                async for change in changes:
                    if isinstance(change, Snapshot):
                        pairs = [(kv.key, kv.value) for kv in change.items]
                    else:
                        pairs = [(e.kv.key, e.kv.value) for e in change.events if e.kind is EventKind.PUT]
                    for key, value in pairs:
                        listener.take(key, value)
        except (StoreError, CodecError) as error:
            log.info("the store can not be followed: %s", error)
        await asyncio.sleep(RETRY_S)
