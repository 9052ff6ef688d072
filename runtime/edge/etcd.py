"""The truth store on etcd, through the public v3 API as etcd 3.4 and 3.5 both have it.

One client owns its connections, and once it has written, a marker key below `writers/` that makes its writes happen
exactly once. Reads are linearizable. Construction does no I/O; use the client on one event loop.

Invariants: those of `store.py`; tests/integration/test_etcd_store.py holds them against clusters that lose members.

Not here: connections (`etcd_rpc.py`), exactly once (`etcd_writer.py`), watches (`etcd_watch.py`).
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager

from elastic_run.runtime.edge import etcd_rpc
from elastic_run.runtime.edge.etcd_config import EtcdConfig
from elastic_run.runtime.edge.etcd_proto import rpc_pb2 as rpc
from elastic_run.runtime.edge.etcd_rpc import PAGE_ITEMS, EtcdRpc, Refused, Tries
from elastic_run.runtime.edge.etcd_watch import watch_events
from elastic_run.runtime.edge.etcd_writer import AttemptFailed, OnceWriter, WriteRequest
from elastic_run.runtime.edge.lease import LeaseKeeper
from elastic_run.runtime.edge.store import (
    CALL_DEADLINE_S,
    LIST_ITEMS_MAX,
    RESERVED_PREFIX,
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
    StoreCorrupt,
    StoreError,
    StoreUnavailable,
)

MARKER_TTL_S = 600  # outlives any outage after which an open write is still worth asking about
LISTINGS_MAX = 3  # a listing overtaken by a compaction is begun anew this often
GOODBYE_S = 1.0  # for giving back the marker; it expires by itself if this fails

_LEASE_ABSENT = "etcdserver: requested lease not found"
_LEASE_EXISTS = "etcdserver: lease already exists"
_COMPACTED = "etcdserver: mvcc: required revision has been compacted"

_log = logging.getLogger(__name__)


class EtcdStore:
    """A `Store` on the etcd cluster and namespace that `config` names."""

    def __init__(self, config: EtcdConfig) -> None:
        self._rpc = EtcdRpc(config)
        self._root = f"{config.namespace}/".encode()
        self._writer = OnceWriter(self._root + RESERVED_PREFIX.encode())
        self._write_lock = asyncio.Lock()
        self._marker_keeper: LeaseKeeper | None = None

    async def get(self, key: str, *, deadline_s: float = CALL_DEADLINE_S) -> KeyValue | None:
        check_key(key)
        request = rpc.RangeRequest(key=self._path(key))
        response = await self._rpc.call(etcd_rpc.RANGE, request, self._rpc.tries(deadline_s))
        return self._key_value(response.kvs[0]) if response.kvs else None

    async def list(self, prefix: str, *, limit: int = LIST_ITEMS_MAX, deadline_s: float = CALL_DEADLINE_S) -> Snapshot:
        tries = self._rpc.tries(deadline_s)
        for _ in range(LISTINGS_MAX):
            snapshot = await self._list_once(prefix, limit, tries)
            if snapshot is not None:
                return snapshot
        raise StoreUnavailable(f"{prefix!r} was compacted {LISTINGS_MAX} times while it was being listed")

    async def txn(
        self,
        compares: Sequence[Compare],
        then: Sequence[Write],
        read_on_failure: Sequence[str] = (),
        *,
        deadline_s: float = CALL_DEADLINE_S,
    ) -> TxnResult:
        check_txn(compares, then, read_on_failure)
        request = WriteRequest(
            compares=[self._compare(compare) for compare in compares],
            then=[self._operation(write) for write in then],
            reads=[rpc.RequestOp(request_range=rpc.RangeRequest(key=self._path(key))) for key in read_on_failure],
        )
        attempts = _WriteAttempts(self._rpc, self._rpc.tries(deadline_s))
        try:
            async with self._writing(deadline_s, attempts):
                outcome = await self._writer.write(request, attempts)
        except Refused as refused:
            if refused.detail == _LEASE_ABSENT:
                raise FenceLost("a lease named by the write is gone") from refused
            raise
        current = tuple(self._key_value(found.kvs[0]) if found.kvs else None for found in outcome.reads)
        return TxnResult(succeeded=outcome.succeeded, revision=outcome.revision, current=current)

    async def compact(self, revision: int, *, deadline_s: float = CALL_DEADLINE_S) -> None:
        try:
            request = rpc.CompactionRequest(revision=revision, physical=False)
            await self._rpc.call(etcd_rpc.COMPACT, request, self._rpc.tries(deadline_s))
        except Refused as refused:
            if refused.detail != _COMPACTED:  # done already, perhaps by an earlier attempt of ours
                raise

    async def lease_grant(self, ttl_s: int, *, deadline_s: float = CALL_DEADLINE_S) -> LeaseId:
        return await _grant(self._rpc, ttl_s, self._rpc.tries(deadline_s))

    async def lease_keepalive_once(self, lease_id: LeaseId, *, deadline_s: float = CALL_DEADLINE_S) -> float:
        request = rpc.LeaseKeepAliveRequest(ID=lease_id)
        try:
            response = await self._rpc.call(etcd_rpc.LEASE_KEEP_ALIVE, request, self._rpc.tries(deadline_s))
        except Refused as refused:
            if refused.detail == _LEASE_ABSENT:
                raise FenceLost(f"lease {lease_id:x} is gone") from refused
            raise
        if response.TTL <= 0:
            raise FenceLost(f"lease {lease_id:x} is gone")
        return float(response.TTL)

    async def lease_revoke(self, lease_id: LeaseId, *, deadline_s: float = CALL_DEADLINE_S) -> None:
        try:
            request = rpc.LeaseRevokeRequest(ID=lease_id)
            await self._rpc.call(etcd_rpc.LEASE_REVOKE, request, self._rpc.tries(deadline_s))
        except Refused as refused:
            if refused.detail != _LEASE_ABSENT:
                raise

    async def watch(
        self, prefix: str, from_revision: int = 0, *, patience_s: float = WATCH_PATIENCE_S
    ) -> AsyncGenerator[WatchBatch, None]:
        key, range_end = self._range(prefix)
        async with aclosing(watch_events(self._rpc, key, range_end, from_revision, patience_s)) as batches:
            async for batch in batches:
                events = tuple(self._event(event) for event in batch if not self._reserved(event.kv.key))
                if events:
                    yield WatchBatch(revision=batch[-1].kv.mod_revision, events=events)

    async def members(self, *, deadline_s: float = CALL_DEADLINE_S) -> tuple[StoreMember, ...]:
        request = rpc.MemberListRequest()
        response = await self._rpc.call(etcd_rpc.MEMBER_LIST, request, self._rpc.tries(deadline_s))
        return tuple(
            StoreMember(name=member.name, member_id=member.ID, client_urls=tuple(member.clientURLs))
            for member in response.members
        )

    async def status(self, *, deadline_s: float = CALL_DEADLINE_S) -> StoreStatus:
        response = await self._rpc.call(etcd_rpc.STATUS, rpc.StatusRequest(), self._rpc.tries(deadline_s))
        return StoreStatus(
            endpoint=self._rpc.endpoint,
            version=response.version,
            member_id=response.header.member_id,
            leader_id=response.leader,
            revision=response.header.revision,
            stored_bytes=response.dbSize,
        )

    async def close(self) -> None:
        if self._marker_keeper is not None:
            await self._marker_keeper.stop()
            try:
                await self.lease_revoke(self._marker_keeper.lease_id, deadline_s=GOODBYE_S)
            except StoreError as error:
                _log.debug("marker left to expire: %s", error)
        await self._rpc.close()

    @asynccontextmanager
    async def _writing(self, deadline_s: float, attempts: "_WriteAttempts") -> AsyncGenerator[None, None]:
        """One write at a time; afterwards its marker is kept alive."""
        try:
            async with asyncio.timeout(deadline_s):
                await self._write_lock.acquire()
        except TimeoutError:
            raise StoreUnavailable(f"earlier writes of this client took all of {deadline_s:g} s; not sent") from None
        try:
            yield
        finally:
            try:
                await self._keep_marker(attempts)
            finally:
                self._write_lock.release()

    async def _keep_marker(self, attempts: "_WriteAttempts") -> None:
        """Keep alive the lease of the marker that the writer uses now."""
        lease_id = self._writer.marker_lease
        keeper = self._marker_keeper
        if lease_id is None or (keeper is not None and keeper.lease_id == lease_id):
            return
        self._marker_keeper = LeaseKeeper(self, lease_id, MARKER_TTL_S, granted_at_s=attempts.granted_at_s)
        self._marker_keeper.start()
        if keeper is not None:
            await keeper.stop()

    async def _list_once(self, prefix: str, limit: int, tries: Tries) -> Snapshot | None:
        """All pages at the revision of the first; None if a compaction came in between."""
        key, range_end = self._range(prefix)
        items: list[KeyValue] = []
        revision = 0
        while True:
            page = min(PAGE_ITEMS, limit - len(items) + 1)
            request = rpc.RangeRequest(key=key, range_end=range_end, limit=page, revision=revision)
            try:
                response = await self._rpc.call(etcd_rpc.RANGE, request, tries)
            except Refused as refused:
                if refused.detail == _COMPACTED:
                    return None
                raise
            revision = revision or response.header.revision
            items.extend(self._key_value(kv) for kv in response.kvs if not self._reserved(kv.key))
            if len(items) > limit or not response.more:
                return Snapshot(revision=revision, items=tuple(items[:limit]), more=len(items) > limit)
            key = response.kvs[-1].key + b"\0"

    def _path(self, key: str) -> bytes:
        return self._root + key.encode()

    def _range(self, prefix: str) -> tuple[bytes, bytes]:
        key = self._path(prefix)
        return key, key[:-1] + bytes((key[-1] + 1,))  # UTF-8 has no byte 0xff, so the last byte can always grow

    def _reserved(self, path: bytes) -> bool:
        return path.startswith(self._root + RESERVED_PREFIX.encode())

    def _key_value(self, kv: rpc.KeyValue) -> KeyValue:
        try:
            key = kv.key[len(self._root) :].decode()
        except UnicodeDecodeError:
            raise StoreCorrupt(f"key {kv.key!r} is not UTF-8: not written by this system") from None
        return KeyValue(
            key=key,
            value=kv.value,
            create_revision=kv.create_revision,
            mod_revision=kv.mod_revision,
            version=kv.version,
            lease_id=LeaseId(kv.lease),
        )

    def _event(self, event: rpc.Event) -> WatchEvent:
        kind = EventKind.DELETE if event.type == rpc.Event.DELETE else EventKind.PUT
        previous = self._key_value(event.prev_kv) if event.HasField("prev_kv") else None
        return WatchEvent(kind=kind, kv=self._key_value(event.kv), previous=previous)

    def _compare(self, compare: Compare) -> rpc.Compare:
        request = rpc.Compare(key=self._path(compare.key), target=_TARGETS[compare.target], result=_OPS[compare.op])
        match compare.target, compare.operand:
            case CompareTarget.VALUE, bytes(value):
                request.value = value
            case CompareTarget.VERSION, int(number):
                request.version = number
            case CompareTarget.CREATE_REVISION, int(number):
                request.create_revision = number
            case CompareTarget.MOD_REVISION, int(number):
                request.mod_revision = number
            case _:
                raise InvariantViolated(f"{compare.target} of {compare.key!r} compared with {compare.operand!r}")
        return request

    def _operation(self, write: Write) -> rpc.RequestOp:
        match write:
            case Put(key=key, value=value, lease_id=lease_id):
                return rpc.RequestOp(request_put=rpc.PutRequest(key=self._path(key), value=value, lease=lease_id))
            case Delete(key=key, prefix=True):
                start, range_end = self._range(key)
                return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=start, range_end=range_end))
            case Delete(key=key):
                return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=self._path(key)))


_TARGETS = {
    CompareTarget.CREATE_REVISION: rpc.Compare.CREATE,
    CompareTarget.MOD_REVISION: rpc.Compare.MOD,
    CompareTarget.VERSION: rpc.Compare.VERSION,
    CompareTarget.VALUE: rpc.Compare.VALUE,
}
_OPS = {
    CompareOp.EQUAL: rpc.Compare.EQUAL,
    CompareOp.NOT_EQUAL: rpc.Compare.NOT_EQUAL,
    CompareOp.LESS: rpc.Compare.LESS,
    CompareOp.GREATER: rpc.Compare.GREATER,
}


class _WriteAttempts:
    """The attempts of one write, as the writer wants them."""

    def __init__(self, client: EtcdRpc, tries: Tries) -> None:
        self.granted_at_s = time.monotonic()
        self._rpc = client
        self._tries = tries

    async def txn(self, request: rpc.TxnRequest) -> rpc.TxnResponse:
        return await self._rpc.attempt(etcd_rpc.TXN, request, self._tries.try_s)

    async def pause(self, failed: AttemptFailed) -> None:
        await self._tries.pause(failed)

    async def grant_marker_lease(self) -> LeaseId:
        return await _grant(self._rpc, MARKER_TTL_S, self._tries)


async def _grant(client: EtcdRpc, ttl_s: int, tries: Tries) -> LeaseId:
    """The id is ours, so that asking twice opens one lease."""
    lease_id = LeaseId(secrets.randbits(62) + 1)
    try:
        await client.call(etcd_rpc.LEASE_GRANT, rpc.LeaseGrantRequest(TTL=ttl_s, ID=lease_id), tries)
    except Refused as refused:
        if refused.detail != _LEASE_EXISTS:
            raise
    return lease_id
