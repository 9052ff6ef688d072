"""Makes each conditional write to etcd happen exactly once, although its attempts may be lost, delayed or duplicated.

The writer owns a marker key holding the number of its newest decided write and its outcome ("+" applied, "-" compares
were false). Each write demands an older marker and sets it in the same transaction, so of all its attempts one at most
takes effect, and a later attempt reads off the marker what became of an earlier one.

Invariants (tests/property/test_store_model.py, against a transport that drops, delays and duplicates at will):
1. Every attempt names the marker's create_revision: one recreated under the same name accepts nothing old.
2. The marker moves when the compares are false, too: a delayed attempt can't succeed after its caller was told "no".
3. "The compares were false" is only ever reported from an answer that carries the values read at that revision.
4. A vanished marker means StoreUncertain only if an earlier attempt of the same write got no answer.

Not here: connections and deadlines (`etcd_rpc.py`), serialising the writes of one client (`etcd.py`).
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from elastic_run.runtime.edge.etcd_proto import rpc_pb2 as rpc
from elastic_run.runtime.edge.store import LeaseId
from elastic_run.runtime.protocol.errors import StoreCorrupt, StoreError, StoreUnavailable, StoreUncertain

SEQUENCE_DIGITS = 20  # zero-padded, so that the order of bytes is the order of numbers
APPLIED = b"+"
COMPARES_FALSE = b"-"
MARKERS_PER_WRITE_MAX = 3  # somebody deleting markers faster than this is at war with us
DECISIONS_PER_WRITE_MAX = 16  # a "no" whose answer was lost is decided anew this often


class AttemptFailed(StoreUnavailable):
    """One attempt got no answer. `maybe_applied`: it was sent, and may take effect now or at any later time."""

    def __init__(self, reason: str, *, endpoint: str, maybe_applied: bool) -> None:
        super().__init__(f"{endpoint}: {reason}")
        self.endpoint = endpoint
        self.maybe_applied = maybe_applied


class Attempts(Protocol):
    """The attempts of one call under its deadline."""

    async def txn(self, request: rpc.TxnRequest) -> rpc.TxnResponse:
        """Try once. Raises AttemptFailed, or another StoreError for a definite refusal of this attempt."""
        ...

    async def pause(self, failed: AttemptFailed) -> None:
        """Get ready for the next attempt. Raises StoreUnavailable when the call's deadline has passed."""
        ...

    async def grant_marker_lease(self) -> LeaseId:
        """A new lease for a marker, tried until the call's deadline."""
        ...


@dataclass(slots=True, kw_only=True)
class Marker:
    key: bytes
    lease_id: LeaseId
    create_revision: int
    sequence: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOutcome:
    """`reads` answers the reads asked for on failure."""

    succeeded: bool
    revision: int
    reads: tuple[rpc.RangeResponse, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteRequest:
    """Apply `then` if all `compares` hold, else answer `reads`. Nothing in it touches a marker."""

    compares: Sequence[rpc.Compare]
    then: Sequence[rpc.RequestOp]
    reads: Sequence[rpc.RequestOp]


class OnceWriter:
    """One client's writes, one at a time: the caller serialises them. `prefix` is where its markers lie."""

    def __init__(self, prefix: bytes) -> None:
        self._prefix = prefix
        self._marker: Marker | None = None

    @property
    def marker_lease(self) -> LeaseId | None:
        """The lease to keep alive, and to revoke at the end."""
        return self._marker.lease_id if self._marker is not None else None

    async def write(self, request: WriteRequest, attempts: Attempts) -> WriteOutcome:
        """Decide one write. Raises StoreUncertain if it may have been applied and no marker tells, else StoreError."""
        for _ in range(DECISIONS_PER_WRITE_MAX):
            outcome = await self._decide(request, attempts)
            if outcome is not None:
                return outcome
        raise StoreUnavailable(f"the store's answer was lost {DECISIONS_PER_WRITE_MAX} times; nothing was written")

    async def _decide(self, request: WriteRequest, attempts: Attempts) -> WriteOutcome | None:
        """One numbered write, attempted until decided. None: it was a "no", and the values read were lost with it."""
        unanswered = False
        markers = 0
        marker: Marker | None = None
        while True:
            try:
                if marker is None:
                    marker = self._marker or await self._open_marker(attempts)
                    markers += 1
                    marker.sequence += 1
                response = await attempts.txn(guarded(request, marker))
            except AttemptFailed as failed:
                unanswered = unanswered or failed.maybe_applied
                await self._pause(failed, attempts, unanswered=unanswered)
                continue
            except StoreError as error:
                if unanswered:
                    raise StoreUncertain(f"an earlier attempt got no answer, then: {error}") from error
                raise
            if response.succeeded:
                return told(response)
            found = marker_found(response, marker)
            if found is not None:
                return read_off(found, marker)
            self._marker = marker = None
            if unanswered:
                raise StoreUncertain("this client's marker vanished while the outcome of a write was open")
            if markers >= MARKERS_PER_WRITE_MAX:
                raise StoreUnavailable(
                    f"this client's marker vanished {markers} times in one write; nothing was written"
                )

    @staticmethod
    async def _pause(failed: AttemptFailed, attempts: Attempts, *, unanswered: bool) -> None:
        try:
            await attempts.pause(failed)
        except StoreUnavailable as over:
            if unanswered:
                raise StoreUncertain(f"a write was sent and no answer came: {over}") from over
            raise

    async def _open_marker(self, attempts: Attempts) -> Marker:
        """A marker with a fresh random name. Creating it twice is harmless: the writes name its create_revision."""
        lease_id = await attempts.grant_marker_lease()
        key = self._prefix + secrets.token_hex(12).encode()
        request = rpc.TxnRequest(
            compare=[rpc.Compare(key=key, target=rpc.Compare.CREATE, result=rpc.Compare.EQUAL, create_revision=0)],
            success=[rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=numbered(0), lease=lease_id))],
            failure=[rpc.RequestOp(request_range=rpc.RangeRequest(key=key))],
        )
        while True:
            try:
                response = await attempts.txn(request)
            except AttemptFailed as failed:
                await attempts.pause(failed)
                continue
            if response.succeeded:
                created = response.header.revision
            else:
                kvs = response.responses[0].response_range.kvs
                if not kvs or kvs[0].lease != lease_id:
                    raise StoreCorrupt(f"{key!r} is not the marker this client made")
                created = kvs[0].create_revision
            self._marker = Marker(key=key, lease_id=lease_id, create_revision=created)
            return self._marker


def numbered(sequence: int) -> bytes:
    """The marker's value before the outcome is appended; less than the value of the same number with an outcome."""
    return b"%0*d" % (SEQUENCE_DIGITS, sequence)


def guarded(request: WriteRequest, marker: Marker) -> rpc.TxnRequest:
    """The transaction of one attempt: the marker decides outside, the caller's compares inside."""
    number = numbered(marker.sequence)

    def mark(outcome: bytes) -> rpc.RequestOp:
        put = rpc.PutRequest(key=marker.key, value=number + outcome, lease=marker.lease_id)
        return rpc.RequestOp(request_put=put)

    inner = rpc.TxnRequest(
        compare=request.compares,
        success=[mark(APPLIED), *request.then],
        failure=[mark(COMPARES_FALSE), *request.reads],
    )
    same_life = rpc.Compare(
        key=marker.key,
        target=rpc.Compare.CREATE,
        result=rpc.Compare.EQUAL,
        create_revision=marker.create_revision,
    )
    undecided = rpc.Compare(key=marker.key, target=rpc.Compare.VALUE, result=rpc.Compare.LESS, value=number)
    return rpc.TxnRequest(
        compare=[same_life, undecided],
        success=[rpc.RequestOp(request_txn=inner)],
        failure=[rpc.RequestOp(request_range=rpc.RangeRequest(key=marker.key))],
    )


def told(response: rpc.TxnResponse) -> WriteOutcome:
    """The outcome, from the answer to the attempt that decided it."""
    inner = response.responses[0].response_txn
    if inner.succeeded:
        return WriteOutcome(succeeded=True, revision=response.header.revision)
    reads = tuple(part.response_range for part in inner.responses[1:])
    return WriteOutcome(succeeded=False, revision=response.header.revision, reads=reads)


def marker_found(response: rpc.TxnResponse, marker: Marker) -> rpc.KeyValue | None:
    """The marker as it stands, or None if it is gone or not the one this write is guarded by."""
    kvs = response.responses[0].response_range.kvs
    return kvs[0] if kvs and kvs[0].create_revision == marker.create_revision else None


def read_off(found: rpc.KeyValue, marker: Marker) -> WriteOutcome | None:
    """The outcome, from the marker an earlier attempt left. None: the compares were false, the values read are lost."""
    number = numbered(marker.sequence)
    if found.value == number + APPLIED:
        return WriteOutcome(succeeded=True, revision=found.mod_revision)
    if found.value == number + COMPARES_FALSE:
        return None
    raise StoreCorrupt(f"marker {marker.key!r} holds {found.value[:64]!r}, which write {marker.sequence} cannot meet")
