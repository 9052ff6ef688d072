"""Who leads: one key, created by the leader under its lease; its create_revision is the fencing token.

Every write of a leader carries `Fence.compare()`. A leader deposed without knowing it, because it was paused or cut
off, still believes in itself, but writes nothing: the store refuses a token that is no longer current.

Invariants (tests/unit/test_election.py):
1. At most one fence per key is current at any revision; tokens only grow.
2. A campaign that was cancelled or lost its answer is continued by campaigning again with the same lease.

Not here: keeping the lease alive (`lease.py`), what a leader does (the controller).
"""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

from elastic_run.runtime.edge.store import (
    CALL_DEADLINE_S,
    Compare,
    Delete,
    EventKind,
    LeaseId,
    Put,
    Store,
    TxnResult,
    Write,
    absent,
    created_at,
)
from elastic_run.runtime.protocol.errors import FenceLost, StoreCompacted, StoreUncertain

RECHECK_S = 30.0  # a watcher of the key looks for itself this often, whatever the watch says
UNCERTAIN_TRIES_MAX = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """Proof of leadership at one moment: `token` is the revision at which `key` was created for this leader."""

    key: str
    token: int

    def compare(self) -> Compare:
        """The condition that every write of this leader carries."""
        return created_at(self.key, self.token)


async def campaign(store: Store, *, key: str, value: bytes, lease_id: LeaseId) -> Fence:
    """Wait until the key is free, then take it. Cancel to give up, and revoke the lease then: it may just have won.

    Raises FenceLost if the lease is gone, StoreUnavailable if the store is: campaign again with a lease that is held.
    """
    uncertain = 0
    while True:
        try:
            taken = await store.txn((absent(key),), (Put(key=key, value=value, lease_id=lease_id),), (key,))
        except StoreUncertain:
            uncertain += 1
            if uncertain >= UNCERTAIN_TRIES_MAX:
                raise
            continue
        uncertain = 0
        if taken.succeeded:
            return Fence(key=key, token=taken.revision)
        holder = taken.current[0]
        if holder is not None and holder.lease_id == lease_id:
            return Fence(key=key, token=holder.create_revision)
        await _until_deleted(store, key, taken.revision + 1)


async def fenced_txn(
    store: Store,
    fence: Fence,
    compares: Sequence[Compare],
    then: Sequence[Write],
    read_on_failure: Sequence[str] = (),
    *,
    deadline_s: float = CALL_DEADLINE_S,
) -> TxnResult:
    """A txn of the leader. Raises FenceLost if it no longer leads, and nothing was written; else as `Store.txn`."""
    reads = (fence.key, *read_on_failure)
    result = await store.txn((fence.compare(), *compares), then, reads, deadline_s=deadline_s)
    if result.succeeded:
        return result
    holder = result.current[0]
    if holder is None or holder.create_revision != fence.token:
        successor = "nobody" if holder is None else f"token {holder.create_revision}"
        raise FenceLost(f"{fence.key!r} is held by {successor}, not by token {fence.token}")
    return TxnResult(succeeded=False, revision=result.revision, current=result.current[1:])


async def until_lost(store: Store, fence: Fence) -> None:
    """Return once the fence is no longer current. A held lease is needed besides: this hears nothing while cut off."""
    while True:
        holder = await store.get(fence.key)
        if holder is None or holder.create_revision != fence.token:
            return
        await _until_deleted(store, fence.key, holder.mod_revision + 1)


async def resign(store: Store, fence: Fence) -> bool:
    """Give up leadership. False if it was lost before."""
    result = await store.txn((fence.compare(),), (Delete(key=fence.key),))
    return result.succeeded


async def _until_deleted(store: Store, key: str, from_revision: int) -> None:
    """Return when the key may have been deleted: on its delete, on a gap in the history, and every RECHECK_S."""
    try:
        async with asyncio.timeout(RECHECK_S), aclosing(store.watch(key, from_revision)) as batches:
            async for batch in batches:
                if any(event.kind is EventKind.DELETE and event.kv.key == key for event in batch.events):
                    return
    except (TimeoutError, StoreCompacted):
        return
