"""The truth store as the rest of the system sees it: keys, conditional writes, leases, watches.

Keys are UTF-8 strings below the store's own namespace, which no caller sees: `nodes/a`, never `/elastic/job/nodes/a`.
Keys below `writers/` belong to the store itself: they are never listed, watched or written by callers.

Invariants (tests/store_contract.py, run against etcd and against the tests' in-memory store):
1. A txn that succeeded was applied exactly once; one that did not, or raised another error than StoreUncertain, never.
2. A txn that raises StoreUncertain, or was cancelled, was applied once or not at all. If it is still under way it can
   be applied until the next write of the same client returns, and never after that.
3. A watch delivers every change of its prefix once, in order of revision, or raises StoreCompacted.
4. A lease is not trusted longer than its last confirmed time to live on our own clock (LeaseKeeper in `lease.py`).

Not here: etcd (`etcd.py`), leases kept alive (`lease.py`), leader election (`election.py`).
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from enum import StrEnum
from typing import NewType, Protocol

from elastic_run.runtime.protocol.errors import InvariantViolated, StoreCompacted, StoreCorrupt

LeaseId = NewType("LeaseId", int)
NO_LEASE = LeaseId(0)

RESERVED_PREFIX = "writers/"
CALL_DEADLINE_S = 5.0  # longer than an election of the store, shorter than a person's patience
WATCH_PATIENCE_S = 60.0  # a watch outlives an outage this long before it tells its caller
LIST_ITEMS_MAX = 100_000  # ten keys for each of 10,000 nodes
TXN_OPS_MAX = 100  # etcd refuses more than 128 in a transaction; ours adds a few
KEY_BYTES_MAX = 1024
VALUE_BYTES_MAX = 1024 * 1024  # etcd refuses requests over 1.5 MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyValue:
    """One key as stored. `version` counts writes since the key was created; `lease_id` is 0 without a lease."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease_id: LeaseId


class CompareTarget(StrEnum):
    CREATE_REVISION = "create_revision"
    MOD_REVISION = "mod_revision"
    VERSION = "version"
    VALUE = "value"


class CompareOp(StrEnum):
    EQUAL = "="
    NOT_EQUAL = "!="
    LESS = "<"
    GREATER = ">"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compare:
    """`target` of `key` stands in relation `op` to `operand`.

    A key that does not exist has revisions and version 0; its value compares false whatever the relation.
    """

    key: str
    target: CompareTarget
    op: CompareOp
    operand: int | bytes


def absent(key: str) -> Compare:
    """The key does not exist."""
    return Compare(key=key, target=CompareTarget.VERSION, op=CompareOp.EQUAL, operand=0)


def created_at(key: str, revision: int) -> Compare:
    """The key exists since `revision` without a break: the fencing condition."""
    return Compare(key=key, target=CompareTarget.CREATE_REVISION, op=CompareOp.EQUAL, operand=revision)


def modified_at(key: str, revision: int) -> Compare:
    """The key was last written at `revision` (0: it does not exist): the compare of a read-modify-write."""
    return Compare(key=key, target=CompareTarget.MOD_REVISION, op=CompareOp.EQUAL, operand=revision)


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    key: str
    value: bytes
    lease_id: LeaseId = NO_LEASE


@dataclass(frozen=True, slots=True, kw_only=True)
class Delete:
    """Deletes `key`, or with `prefix` every key that begins with it. A key that does not exist is no error."""

    key: str
    prefix: bool = False


Write = Put | Delete


@dataclass(frozen=True, slots=True, kw_only=True)
class TxnResult:
    """`revision` is that of the write itself; of the moment the compares were false when not `succeeded`.

    `current` holds the keys of `read_on_failure` in their order as they were at `revision`; empty when `succeeded`.
    """

    succeeded: bool
    revision: int
    current: tuple[KeyValue | None, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All keys of a prefix, sorted, at one revision. `more`: cut at the limit asked for.

    `relisted`: this snapshot of `follow` repairs a gap: compare it with what you hold, changes in between are missing.
    """

    revision: int
    items: tuple[KeyValue, ...]
    more: bool = False
    relisted: bool = False


class EventKind(StrEnum):
    PUT = "put"
    DELETE = "delete"


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchEvent:
    """One change. Of a delete, `kv` has only key and revision; `previous` is what stood there, if still known."""

    kind: EventKind
    kv: KeyValue
    previous: KeyValue | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchBatch:
    """Changes in order, whole transactions, never none. All changes of the prefix up to `revision` are delivered."""

    revision: int
    events: tuple[WatchEvent, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreMember:
    name: str
    member_id: int
    client_urls: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStatus:
    """What the endpoint in use says about itself; `leader_id` is 0 while the cluster has none."""

    endpoint: str
    version: str
    member_id: int
    leader_id: int
    revision: int
    stored_bytes: int


class Store(Protocol):
    """Every call ends within `deadline_s`, raising StoreUnavailable, StoreDenied or another StoreError if it must."""

    async def get(self, key: str, *, deadline_s: float = CALL_DEADLINE_S) -> KeyValue | None:
        """Read one key, linearizable."""
        ...

    async def list(self, prefix: str, *, limit: int = LIST_ITEMS_MAX, deadline_s: float = CALL_DEADLINE_S) -> Snapshot:
        """Read the first `limit` keys of a prefix at one revision, linearizable."""
        ...

    async def txn(
        self,
        compares: Sequence[Compare],
        then: Sequence[Write],
        read_on_failure: Sequence[str] = (),
        *,
        deadline_s: float = CALL_DEADLINE_S,
    ) -> TxnResult:
        """Apply all of `then` if all compares hold, exactly once. No two writes may touch the same key.

        Raises FenceLost if a lease named by a Put is gone, StoreUncertain if the outcome cannot be found out.
        """
        ...

    async def compact(self, revision: int, *, deadline_s: float = CALL_DEADLINE_S) -> None:
        """Forget the history before `revision`."""
        ...

    async def lease_grant(self, ttl_s: int, *, deadline_s: float = CALL_DEADLINE_S) -> LeaseId:
        """Open a lease of at least `ttl_s` seconds, counted from this call."""
        ...

    async def lease_keepalive_once(self, lease_id: LeaseId, *, deadline_s: float = CALL_DEADLINE_S) -> float:
        """Renew a lease; its time to live in seconds, counted from this call. Raises FenceLost if it is gone."""
        ...

    async def lease_revoke(self, lease_id: LeaseId, *, deadline_s: float = CALL_DEADLINE_S) -> None:
        """End a lease and delete its keys. A lease that is gone already is no error."""
        ...

    def watch(
        self, prefix: str, from_revision: int = 0, *, patience_s: float = WATCH_PATIENCE_S
    ) -> AsyncGenerator[WatchBatch, None]:
        """Follow the changes of a prefix from a revision on (0: from now). Close it, or wrap it in `aclosing`.

        Raises StoreCompacted if the history asked for is gone, StoreUnavailable after `patience_s` without the store.
        """
        ...

    async def members(self, *, deadline_s: float = CALL_DEADLINE_S) -> tuple[StoreMember, ...]:
        """The members of the store's cluster."""
        ...

    async def status(self, *, deadline_s: float = CALL_DEADLINE_S) -> StoreStatus:
        """Health and size, as told by the endpoint in use."""
        ...

    async def close(self) -> None:
        """Give back what this client holds in the store, and its connections."""
        ...


async def follow(
    store: Store, prefix: str, *, patience_s: float = WATCH_PATIENCE_S
) -> AsyncGenerator[Snapshot | WatchBatch, None]:
    """A snapshot of the prefix, then its changes; after a compaction a snapshot marked `relisted`, and so on."""
    relisted = False
    while True:
        found = await store.list(prefix)
        if found.more:
            raise StoreCorrupt(f"more than {LIST_ITEMS_MAX} keys below {prefix!r}: not written by this system")
        yield Snapshot(revision=found.revision, items=found.items, relisted=relisted)
        relisted = True
        try:
            async with aclosing(store.watch(prefix, found.revision + 1, patience_s=patience_s)) as batches:
                async for batch in batches:
                    yield batch
        except StoreCompacted:
            continue


def check_key(key: str) -> None:
    """Refuse a key no caller may write or read."""
    if not key or len(key.encode()) > KEY_BYTES_MAX or key.startswith(RESERVED_PREFIX):
        raise InvariantViolated(
            f"key {key!r}: want 1 to {KEY_BYTES_MAX} bytes, not below {RESERVED_PREFIX!r}, which is the store's own"
        )


def check_txn(compares: Sequence[Compare], then: Sequence[Write], read_on_failure: Sequence[str]) -> None:
    """Refuse what etcd would refuse: too many operations, too large values, two writes to one key."""
    if len(compares) > TXN_OPS_MAX or len(then) > TXN_OPS_MAX or len(read_on_failure) > TXN_OPS_MAX:
        raise InvariantViolated(f"a txn may hold {TXN_OPS_MAX} compares, writes and reads each")
    for key in (*(compare.key for compare in compares), *read_on_failure):
        check_key(key)
    written: list[str] = []
    deleted: list[str] = []
    for write in then:
        if isinstance(write, Delete) and write.prefix:
            if RESERVED_PREFIX.startswith(write.key) or write.key.startswith(RESERVED_PREFIX):
                raise InvariantViolated(f"deleting {write.key!r} would touch the store's own keys")
            deleted.append(write.key)
            continue
        check_key(write.key)
        if isinstance(write, Put) and len(write.value) > VALUE_BYTES_MAX:
            raise InvariantViolated(f"value of {write.key!r} has {len(write.value)} bytes, over {VALUE_BYTES_MAX}")
        written.append(write.key)
    clashing = len(set(written)) != len(written) or any(key.startswith(root) for key in written for root in deleted)
    if clashing:
        raise InvariantViolated("two writes of one txn touch the same key")
