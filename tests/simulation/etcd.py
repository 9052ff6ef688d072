"""A small etcd in virtual time: revisions, fenced transactions, leases, watches that lag, outages.

One `Etcd` is the cluster; an `EtcdClient` is what runtime/edge/etcd.py is to one process, with the promises of
runtime/edge/store.py: a write is applied once, or not at all, or its outcome is StoreUncertain; then it may still be
applied until the next write of the same client returns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from simulation.clock import Process, Simulation
from simulation.network import Network

from elastic_run.runtime.edge.store import (
    CALL_DEADLINE_S,
    WATCH_PATIENCE_S,
    Delete,
    EventKind,
    KeyValue,
    LeaseId,
    Put,
    Snapshot,
    TxnResult,
    WatchBatch,
    WatchEvent,
    Write,
)
from elastic_run.runtime.protocol.errors import FenceLost, StoreError, StoreUnavailable, StoreUncertain

HOST = "etcd"
RTT_S = (0.0005, 0.006)
RETRY_S = 0.2
LEASE_SLACK_S = 0.6
"""etcd looks for expired leases every half second."""

Compare = tuple[str, int]
"""The key was created at this revision; 0: it does not exist."""
Answer = Callable[[Any], None]
"""Takes the result, or the StoreError that stands for it."""


@dataclass(slots=True)
class _Lease:
    ttl_s: float
    expires_at: float


class Etcd:
    def __init__(self, sim: Simulation, network: Network, *, lag_s_max: float, uncertain_rate: float) -> None:
        self.sim, self.network = sim, network
        self.lag_s_max, self.uncertain_rate = lag_s_max, uncertain_rate
        self.revision = 1
        self.keys: dict[str, KeyValue] = {}
        self.history: list[WatchEvent] = []
        self.compacted = 0
        self._outages = 0
        self.leases: dict[LeaseId, _Lease] = {}
        self._lease_count = 0
        self._watches: list[Watch] = []

    @property
    def down(self) -> bool:
        return self._outages > 0

    def begin_outage(self) -> None:
        self.sim.tell(HOST, "is away")
        self._outages += 1

    def end_outage(self) -> None:
        """Leases start anew, as after any change of etcd's own leader."""
        self._outages -= 1
        if not self.down:
            self.sim.tell(HOST, "is back")
            for lease_id, lease in self.leases.items():
                lease.expires_at = self.sim.now + lease.ttl_s
                self._expire_later(lease_id)

    def txn(self, compares: Sequence[Compare], writes: Sequence[Write], reads: Sequence[str]) -> TxnResult:
        if not all(self.created(key) == revision for key, revision in compares):
            current = tuple(self.keys.get(key) for key in reads)
            return TxnResult(succeeded=False, revision=self.revision, current=current)
        for write in writes:
            if isinstance(write, Put) and write.lease_id and write.lease_id not in self.leases:
                raise FenceLost(f"lease {write.lease_id} is gone")
        self.revision += 1
        self._write(writes)
        return TxnResult(succeeded=True, revision=self.revision)

    def created(self, key: str) -> int:
        found = self.keys.get(key)
        return found.create_revision if found else 0

    def snapshot(self, prefix: str, *, relisted: bool = False) -> Snapshot:
        items = tuple(kv for key, kv in sorted(self.keys.items()) if key.startswith(prefix))
        return Snapshot(revision=self.revision, items=items, relisted=relisted)

    def grant(self, ttl_s: float) -> LeaseId:
        self._lease_count += 1
        lease_id = LeaseId(self._lease_count)
        self.leases[lease_id] = _Lease(ttl_s, self.sim.now + ttl_s)
        self._expire_later(lease_id)
        return lease_id

    def renew(self, lease_id: LeaseId) -> float:
        lease = self.leases.get(lease_id)
        if lease is None:
            raise FenceLost(f"lease {lease_id} is gone")
        lease.expires_at = self.sim.now + lease.ttl_s
        return lease.ttl_s

    def revoke(self, lease_id: LeaseId) -> None:
        if self.leases.pop(lease_id, None) is not None:
            held = sorted(key for key, kv in self.keys.items() if kv.lease_id == lease_id)
            if held:
                self.revision += 1
                self._write([Delete(key=key) for key in held])

    def compact(self) -> None:
        """Forget all history: whoever has not seen it has to list again."""
        self.compacted = self.revision + 1

    def watch(self, watch: "Watch") -> None:
        self._watches.append(watch)

    def unwatch(self, watch: "Watch") -> None:
        self._watches.remove(watch)

    def _expire_later(self, lease_id: LeaseId) -> None:
        lease = self.leases[lease_id]
        wait_s = max(0.0, lease.expires_at - self.sim.now) + self.sim.between(0.0, LEASE_SLACK_S)
        self.sim.at(wait_s, lambda: self._expire(lease_id, lease))

    def _expire(self, lease_id: LeaseId, lease: _Lease) -> None:
        if self.down or self.leases.get(lease_id) is not lease:
            return
        if lease.expires_at > self.sim.now:
            self._expire_later(lease_id)
            return
        self.sim.tell(HOST, f"lease {lease_id} expired")
        self.revoke(lease_id)

    def _write(self, writes: Sequence[Write]) -> None:
        events: list[WatchEvent] = []
        for write in writes:
            previous = self.keys.get(write.key)
            if isinstance(write, Put):
                kv = KeyValue(
                    key=write.key,
                    value=write.value,
                    create_revision=previous.create_revision if previous else self.revision,
                    mod_revision=self.revision,
                    version=previous.version + 1 if previous else 1,
                    lease_id=write.lease_id,
                )
                self.keys[write.key] = kv
                events.append(WatchEvent(kind=EventKind.PUT, kv=kv, previous=previous))
            elif previous is not None:
                del self.keys[write.key]
                gone = KeyValue(
                    key=write.key,
                    value=b"",
                    create_revision=0,
                    mod_revision=self.revision,
                    version=0,
                    lease_id=LeaseId(0),
                )
                events.append(WatchEvent(kind=EventKind.DELETE, kv=gone, previous=previous))
        self.history.extend(events)
        for watch in tuple(self._watches):
            if any(event.kv.key.startswith(watch.prefix) for event in events):
                watch.wake()


class Watch:
    """`store.follow`: a snapshot, then changes in order, each once; a compacted gap is answered by a new snapshot."""

    def __init__(
        self, client: "EtcdClient", prefix: str, on_change: Callable[[Snapshot | WatchBatch], None], on_lost: Answer
    ) -> None:
        self._client, self._etcd, self.prefix = client, client.etcd, prefix
        self._on_change, self._on_lost = on_change, on_lost
        self._cursor = 0
        self.closed = self._watching = False
        self._due = 0.0
        self._unreached_since: float | None = None
        self._list(relisted=False)

    def close(self) -> None:
        if self._watching:
            self._etcd.unwatch(self)
        self.closed, self._watching = True, False

    def wake(self) -> None:
        sim = self._etcd.sim
        self._due = max(self._due, sim.now + sim.between(0.0, self._etcd.lag_s_max))
        self._client.process.after(self._due - sim.now, self._deliver)

    def _list(self, *, relisted: bool) -> None:
        self._client.call(lambda: self._listed(relisted), self._began)

    def _listed(self, relisted: bool) -> Snapshot:
        self._cursor = len(self._etcd.history)
        return self._etcd.snapshot(self.prefix, relisted=relisted)

    def _began(self, found: Snapshot | StoreError) -> None:
        if self.closed:
            return
        if isinstance(found, StoreError):
            self._fail(found)
            return
        if not self._watching:
            self._etcd.watch(self)
            self._watching = True
        self._on_change(found)
        self._deliver()  # what changed between the listing and now

    def _deliver(self) -> None:
        etcd, client = self._etcd, self._client
        if self.closed or self._cursor >= len(etcd.history):
            return
        if not client.reaches():
            now = etcd.sim.now
            self._unreached_since = now if self._unreached_since is None else self._unreached_since
            if now - self._unreached_since >= WATCH_PATIENCE_S:
                self._fail(StoreUnavailable(f"the store was away for {WATCH_PATIENCE_S:g} s"))
            else:
                client.process.after(RETRY_S, self._deliver)
            return
        self._unreached_since = None
        missed = etcd.history[self._cursor :]
        if missed[0].kv.mod_revision < etcd.compacted and etcd.compacted <= etcd.revision:
            self._list(relisted=True)
            return
        self._cursor = len(etcd.history)
        events = tuple(event for event in missed if event.kv.key.startswith(self.prefix))
        if events:
            self._on_change(WatchBatch(revision=events[-1].kv.mod_revision, events=events))

    def _fail(self, error: StoreError) -> None:
        self.close()
        self._on_lost(error)


class EtcdClient:
    """One process' connection to the store."""

    def __init__(self, etcd: Etcd, process: Process) -> None:
        self.etcd, self.process = etcd, process
        self._late: list[Callable[[], None]] = []
        self._watches: list[Watch] = []

    def follow(self, prefix: str, on_change: Callable[[Snapshot | WatchBatch], None], on_lost: Answer) -> Watch:
        watch = Watch(self, prefix, on_change, on_lost)
        self._watches = [*(known for known in self._watches if not known.closed), watch]
        return watch

    def close(self) -> None:
        for watch in self._watches:
            watch.close()

    def reaches(self) -> bool:
        return not self.etcd.down and self.etcd.network.both_ways(self.process.host, HOST)

    def call(self, read: Callable[[], Any], answer: Answer, *, deadline_s: float = CALL_DEADLINE_S) -> None:
        """A call that may be repeated without harm."""
        self._try(read, answer, self.etcd.sim.now + deadline_s, write=False)

    def txn(
        self,
        compares: Sequence[Compare],
        writes: Sequence[Write],
        answer: Answer,
        *,
        reads: Sequence[str] = (),
        deadline_s: float = CALL_DEADLINE_S,
        applied: Callable[[], None] = lambda: None,
    ) -> None:
        """A write; `applied` runs at the very moment it is."""

        def apply() -> TxnResult:
            result = self.etcd.txn(compares, writes, reads)
            if result.succeeded:
                applied()
            return result

        self._try(apply, answer, self.etcd.sim.now + deadline_s, write=True)

    def _try(self, operation: Callable[[], Any], answer: Answer, deadline: float, *, write: bool) -> None:
        sim = self.etcd.sim
        if write and sim.chance(self.etcd.uncertain_rate):
            self._lose(operation, answer, deadline)
            return
        self.process.after(sim.between(*RTT_S), lambda: self._arrive(operation, answer, deadline, write=write))

    def _arrive(self, operation: Callable[[], Any], answer: Answer, deadline: float, *, write: bool) -> None:
        sim = self.etcd.sim
        if not self.reaches():
            if sim.now >= deadline:
                answer(StoreUnavailable("no endpoint answered within the deadline"))
            else:
                self.process.after(RETRY_S, lambda: self._arrive(operation, answer, deadline, write=write))
            return
        if write:
            self._apply_late()
        self.process.after(sim.between(*RTT_S), partial(answer, _outcome(operation)))

    def _lose(self, operation: Callable[[], Any], answer: Answer, deadline: float) -> None:
        """The answer is lost: the write was applied, or was not, or will be before the next one returns."""
        sim = self.etcd.sim
        fate = sim.rng.randrange(3)
        self.process.tell(f"an answer of the store is lost, fate {fate}")
        if fate == 0 and self.reaches():
            self._apply_late()
            _outcome(operation)
        elif fate == 1:
            self._late.append(lambda: _outcome(operation))
            sim.at(sim.between(0.0, 2 * CALL_DEADLINE_S), self._apply_late)
        error = StoreUncertain("it can not be found out whether the write was applied")
        self.process.after(sim.between(0.0, max(0.0, deadline - sim.now)), lambda: answer(error))

    def _apply_late(self) -> None:
        if self.etcd.down:
            self.etcd.sim.at(RETRY_S, self._apply_late)
            return
        late, self._late = self._late, []
        for operation in late:
            operation()


def _outcome(operation: Callable[[], Any]) -> Any:
    try:
        return operation()
    except StoreError as error:
        return error
