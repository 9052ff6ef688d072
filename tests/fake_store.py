"""An in-memory store with etcd's semantics for unit tests: revisions, leases on the test's clock, watches, outages.

`FakeServer` is the cluster, `FakeStore` one client of it; several clients may share a server. Deadlines are not waited
for: a store that is away says so at once. tests/store_contract.py holds it to what etcd does.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from elastic_run.runtime.edge.store import (
    CALL_DEADLINE_S,
    LIST_ITEMS_MAX,
    NO_LEASE,
    WATCH_PATIENCE_S,
    Compare,
    CompareOp,
    CompareTarget,
    Delete,
    EventKind,
    KeyValue,
    LeaseId,
    Put,
    Snapshot,
    StoreMember,
    StoreStatus,
    TxnResult,
    WatchBatch,
    WatchEvent,
    Write,
    check_key,
    check_txn,
)
from elastic_run.runtime.protocol.errors import (
    FenceLost,
    InvariantViolated,
    StoreCompacted,
    StoreError,
    StoreUnavailable,
    StoreUncertain,
)


@dataclass(slots=True)
class _Lease:
    ttl_s: float
    expires_at_s: float


class FakeServer:
    """The state all clients share. `down` is an outage: nothing answers, no lease expires."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.revision = 1
        self.keys: dict[str, KeyValue] = {}
        self.down = False
        self._clock = clock
        self._compacted = 0
        self._history: list[tuple[int, tuple[WatchEvent, ...]]] = []
        self._leases: dict[LeaseId, _Lease] = {}
        self._lease_count = 0
        self._changed: list[asyncio.Event] = []

    def set_down(self, down: bool) -> None:
        """Begin or end an outage. As after any change of leader in etcd, all leases start anew when it ends."""
        if self.down and not down:
            for lease in self._leases.values():
                lease.expires_at_s = self._clock() + lease.ttl_s
        self.down = down
        self.wake()

    def tick(self) -> None:
        """Expire what the clock says; every call does so first."""
        if self.down:
            return
        for lease_id in [known for known, lease in self._leases.items() if lease.expires_at_s <= self._clock()]:
            self.revoke(lease_id)

    def grant(self, ttl_s: float) -> LeaseId:
        self._lease_count += 1
        lease_id = LeaseId(self._lease_count)
        self._leases[lease_id] = _Lease(ttl_s=ttl_s, expires_at_s=self._clock() + ttl_s)
        return lease_id

    def renew(self, lease_id: LeaseId) -> float:
        lease = self._lease(lease_id)
        lease.expires_at_s = self._clock() + lease.ttl_s
        return lease.ttl_s

    def revoke(self, lease_id: LeaseId) -> None:
        if self._leases.pop(lease_id, None) is not None:
            held = sorted(key for key, kv in self.keys.items() if kv.lease_id == lease_id)
            if held:
                self.write([Delete(key=key) for key in held])

    def compact(self, revision: int) -> None:
        if revision > self.revision:
            raise StoreError(f"revision {revision} lies in the future")
        self._compacted = max(self._compacted, revision)
        self._history = [entry for entry in self._history if entry[0] >= self._compacted]

    def holds(self, compare: Compare) -> bool:
        found = self.keys.get(compare.key)
        if isinstance(compare.operand, bytes) != (compare.target is CompareTarget.VALUE):
            raise InvariantViolated(f"{compare.target} of {compare.key!r} compared with {compare.operand!r}")
        if isinstance(compare.operand, bytes):
            return found is not None and _related(found.value, compare.op, compare.operand)
        numbers = {
            CompareTarget.CREATE_REVISION: found.create_revision if found else 0,
            CompareTarget.MOD_REVISION: found.mod_revision if found else 0,
            CompareTarget.VERSION: found.version if found else 0,
        }
        return _related(numbers[compare.target], compare.op, compare.operand)

    def write(self, writes: Sequence[Write]) -> None:
        """One transaction: one revision, whatever it changes."""
        for write in writes:
            if isinstance(write, Put) and write.lease_id != NO_LEASE:
                self._lease(write.lease_id)
        self.revision += 1
        events: list[WatchEvent] = []
        for write in writes:
            if isinstance(write, Put):
                events.append(self._put(write))
            else:
                doomed = [key for key in self.keys if key == write.key or (write.prefix and key.startswith(write.key))]
                events.extend(self._delete(key) for key in sorted(doomed))
        if events:
            self._history.append((self.revision, tuple(events)))
        self.wake()

    def events_from(self, revision: int) -> list[tuple[int, tuple[WatchEvent, ...]]]:
        if revision < self._compacted:
            raise StoreCompacted(self._compacted)
        return [entry for entry in self._history if entry[0] >= revision]

    def subscribe(self) -> asyncio.Event:
        event = asyncio.Event()
        self._changed.append(event)
        return event

    def unsubscribe(self, event: asyncio.Event) -> None:
        self._changed.remove(event)

    def wake(self) -> None:
        for event in self._changed:
            event.set()

    def _lease(self, lease_id: LeaseId) -> _Lease:
        lease = self._leases.get(lease_id)
        if lease is None:
            raise FenceLost(f"lease {lease_id:x} is gone")
        return lease

    def _put(self, write: Put) -> WatchEvent:
        previous = self.keys.get(write.key)
        kv = KeyValue(
            key=write.key,
            value=write.value,
            create_revision=previous.create_revision if previous else self.revision,
            mod_revision=self.revision,
            version=previous.version + 1 if previous else 1,
            lease_id=write.lease_id,
        )
        self.keys[write.key] = kv
        return WatchEvent(kind=EventKind.PUT, kv=kv, previous=previous)

    def _delete(self, key: str) -> WatchEvent:
        previous = self.keys.pop(key)
        gone = KeyValue(key=key, value=b"", create_revision=0, mod_revision=self.revision, version=0, lease_id=NO_LEASE)
        return WatchEvent(kind=EventKind.DELETE, kv=gone, previous=previous)


class FakeStore:
    """One client. `cut` takes this client alone off the network; `lose_answer` makes its next txn uncertain."""

    def __init__(self, server: FakeServer | None = None) -> None:
        self.server = server if server is not None else FakeServer()
        self.cut = False
        self.lose_answer: Literal["", "applied", "dropped"] = ""
        self._closed = False

    def set_cut(self, cut: bool) -> None:
        self.cut = cut
        self.server.wake()

    async def get(self, key: str, *, deadline_s: float = CALL_DEADLINE_S) -> KeyValue | None:
        check_key(key)
        await self._reach()
        return self.server.keys.get(key)

    async def list(self, prefix: str, *, limit: int = LIST_ITEMS_MAX, deadline_s: float = CALL_DEADLINE_S) -> Snapshot:
        await self._reach()
        items = [kv for key, kv in sorted(self.server.keys.items()) if key.startswith(prefix)]
        return Snapshot(revision=self.server.revision, items=tuple(items[:limit]), more=len(items) > limit)

    async def txn(
        self,
        compares: Sequence[Compare],
        then: Sequence[Write],
        read_on_failure: Sequence[str] = (),
        *,
        deadline_s: float = CALL_DEADLINE_S,
    ) -> TxnResult:
        check_txn(compares, then, read_on_failure)
        await self._reach()
        lost, self.lose_answer = self.lose_answer, ""
        if lost == "dropped":
            raise StoreUncertain("the request was lost, as the test asked")
        succeeded = all(self.server.holds(compare) for compare in compares)
        self.server.write(then if succeeded else ())
        if lost == "applied":
            raise StoreUncertain("the answer was lost, as the test asked")
        current = () if succeeded else tuple(self.server.keys.get(key) for key in read_on_failure)
        return TxnResult(succeeded=succeeded, revision=self.server.revision, current=current)

    async def compact(self, revision: int, *, deadline_s: float = CALL_DEADLINE_S) -> None:
        await self._reach()
        self.server.compact(revision)

    async def lease_grant(self, ttl_s: int, *, deadline_s: float = CALL_DEADLINE_S) -> LeaseId:
        await self._reach()
        return self.server.grant(ttl_s)

    async def lease_keepalive_once(self, lease_id: LeaseId, *, deadline_s: float = CALL_DEADLINE_S) -> float:
        await self._reach()
        return self.server.renew(lease_id)

    async def lease_revoke(self, lease_id: LeaseId, *, deadline_s: float = CALL_DEADLINE_S) -> None:
        await self._reach()
        self.server.revoke(lease_id)

    async def watch(
        self, prefix: str, from_revision: int = 0, *, patience_s: float = WATCH_PATIENCE_S
    ) -> AsyncGenerator[WatchBatch, None]:
        server = self.server
        following = from_revision or server.revision + 1
        changed = server.subscribe()
        try:
            while True:
                await self._await_reachable(changed, patience_s)
                changed.clear()
                for revision, events in server.events_from(following):
                    following = revision + 1
                    below = tuple(event for event in events if event.kv.key.startswith(prefix))
                    if below:
                        yield WatchBatch(revision=revision, events=below)
                if not changed.is_set():
                    await changed.wait()
        finally:
            server.unsubscribe(changed)

    async def members(self, *, deadline_s: float = CALL_DEADLINE_S) -> tuple[StoreMember, ...]:
        await self._reach()
        return (StoreMember(name="fake", member_id=1, client_urls=("fake://",)),)

    async def status(self, *, deadline_s: float = CALL_DEADLINE_S) -> StoreStatus:
        await self._reach()
        stored = sum(len(kv.key) + len(kv.value) for kv in self.server.keys.values())
        return StoreStatus(
            endpoint="fake", version="0", member_id=1, leader_id=1, revision=self.server.revision, stored_bytes=stored
        )

    async def close(self) -> None:
        self._closed = True

    async def _reach(self) -> None:
        await asyncio.sleep(0)  # as any call to a real store, this one lets others run
        if self.server.down or self.cut or self._closed:
            raise StoreUnavailable("the store is away, as the test asked")
        self.server.tick()

    async def _await_reachable(self, changed: asyncio.Event, patience_s: float) -> None:
        try:
            async with asyncio.timeout(patience_s):
                while self.server.down or self.cut:
                    changed.clear()
                    await changed.wait()
        except TimeoutError:
            raise StoreUnavailable(f"the store was away for {patience_s:g} s, as the test asked") from None


def _related(found: int | bytes, op: CompareOp, operand: int | bytes) -> bool:
    order = (found > operand) - (found < operand)  # type: ignore[operator]
    return {
        CompareOp.EQUAL: order == 0,
        CompareOp.NOT_EQUAL: order != 0,
        CompareOp.LESS: order < 0,
        CompareOp.GREATER: order > 0,
    }[op]


class Clock:
    """A clock that stands until told otherwise. `sleep` advances it, as if nothing else happened meanwhile."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self._moved = asyncio.Event()

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
        self._moved.set()

    async def sleep(self, seconds: float) -> None:
        self.advance(seconds)
        await asyncio.sleep(0)

    async def reached(self, at_s: float) -> None:
        """Return once somebody's sleep has brought the clock to `at_s`."""
        while self.now_s < at_s:
            self._moved.clear()
            await self._moved.wait()
