"""Asks about one job: its leading controller for the state of the moment, etcd for the history.

Invariants (tests/integration/test_ctl.py):
1. Every question ends: what does not answer within its deadline is said not to, never waited for.
2. follow_events() tells every event once, in order, whoever leads and whichever member of etcd dies meanwhile.
Not here: which job (find.py), deleting it (forget.py), showing the answers (text.py, cli.py).
"""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

from elastic_run.runtime.ctl.find import NoSuchJob, Target
from elastic_run.runtime.ctl.picture import JobPicture, from_records, from_report
from elastic_run.runtime.edge import rpc, store_access
from elastic_run.runtime.edge.store import EventKind, KeyValue, Snapshot, Store, WatchBatch, follow
from elastic_run.runtime.protocol import codec
from elastic_run.runtime.protocol.errors import CodecError, PeerError, StoreCorrupt, StoreUnavailable
from elastic_run.runtime.protocol.records import EVENTS_PREFIX, EventRecord, JobRecords, decode_job, namespace
from elastic_run.runtime.protocol.records import EventKind as Kind

ANSWER_S = 5.0
"""For the store to answer a command; an election in it is over by then."""
OUTAGE_S = 3.0
"""A watch that cannot be had for this long asks whether the job is still there."""
OUTAGES_MAX = 20
"""Outages in a row, a minute in all, after which --follow gives up."""


class JobClient:
    """One job, made by `connected`."""

    def __init__(self, target: Target, store: Store) -> None:
        self.target = target
        self._store = store

    async def records(self) -> JobRecords:
        """Return everything etcd holds. Raises NoSuchJob, StoreCorrupt or another StoreError."""
        found = await self._store.list("", deadline_s=ANSWER_S)
        if not found.items:
            where = ", ".join(self.target.store.endpoints)
            raise NoSuchJob(f"there is no job {self.target.job_id} in the store at {where}; correct --rdzv-id")
        return decode_job(self.target.job_id, ((item.key, item.value) for item in found.items))

    async def picture(self) -> JobPicture:
        """Return the leader's picture of the job; the store's when no leader answers."""
        records = await self.records()
        if records.leader is None:
            problem = "the job has ended" if records.result else "no controller leads at the moment"
            return from_records(self.target.job_id, records, problem)
        try:
            return from_report(await rpc.fetch_status(records.leader.address), records)
        except (PeerError, CodecError) as error:
            return from_records(self.target.job_id, records, str(error))

    async def follow_events(self) -> AsyncGenerator[EventRecord, None]:
        """Yield every event so far, then each new one, up to the end of the job.

        Raises NoSuchJob, StoreUnavailable when the store stays away, StoreCorrupt for an event that is none.
        """
        await self.records()
        newest = outages = 0
        while True:
            try:
                async with aclosing(follow(self._store, EVENTS_PREFIX, patience_s=OUTAGE_S)) as changes:
                    async for change in changes:
                        outages = 0
                        for event in _events_in(change):
                            if event.sequence <= newest:
                                continue
                            newest = event.sequence
                            yield event
                            if event.kind is Kind.JOB_ENDED:
                                return
            except StoreUnavailable as error:
                outages += 1
                if self.target.certainly_over:
                    raise StoreUnavailable("the job's launcher is gone, and the job's store with it") from None
                if outages >= OUTAGES_MAX:
                    raise StoreUnavailable(f"the store stays away: {error}") from None


@asynccontextmanager
async def connected(target: Target) -> AsyncIterator[JobClient]:
    """A client whose connections end with the block."""
    store = store_access.open_store(target.store, namespace(target.job_id))
    try:
        yield JobClient(target, store)
    finally:
        await store.close()


def _events_in(change: Snapshot | WatchBatch) -> list[EventRecord]:
    if isinstance(change, Snapshot):
        return _decoded(change.items)
    return _decoded([event.kv for event in change.events if event.kind is EventKind.PUT])


def _decoded(items: Sequence[KeyValue]) -> list[EventRecord]:
    try:
        return [codec.decode(EventRecord, item.value, where=item.key) for item in items]
    except CodecError as error:
        raise StoreCorrupt(f"the event log holds something foreign or corrupt: {error}") from None
