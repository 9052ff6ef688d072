"""Deletes every key of a job that is over, also what is corrupt or not of this program.

Invariants (tests/integration/test_ctl.py):
1. While a leader or a node holds its lease nothing is deleted; one that comes meanwhile stops the deletion.
2. No key of another job is touched.
Not here: asking the person first (cli.py).
"""

from dataclasses import dataclass

from elastic_run.runtime.ctl.find import NoSuchJob, Target
from elastic_run.runtime.edge import store_access
from elastic_run.runtime.edge.store import (
    NO_LEASE,
    RESERVED_PREFIX,
    TXN_OPS_MAX,
    Compare,
    Delete,
    KeyValue,
    Store,
    modified_at,
)
from elastic_run.runtime.protocol.errors import PeerRefused, StoreCorrupt
from elastic_run.runtime.protocol.records import LEADER_KEY, NODES_PREFIX, SYNC_PREFIX

ROOT = "/elastic"
ROUNDS_MAX = 3
"""Listings until nothing is left: a candidate that is just ending may write once more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remains:
    """What etcd holds of a job."""

    items: tuple[KeyValue, ...]
    unreadable: str
    """About keys that are not text, which no listing shows; else empty."""

    def describe(self) -> str:
        """Return one line that says what will be deleted."""
        folders: dict[str, int] = {}
        for item in self.items:
            folder, slash, _ = item.key.partition("/")
            folders[folder + slash] = folders.get(folder + slash, 0) + 1
        parts = [f"{name}{f' ({count})' if name.endswith('/') else ''}" for name, count in sorted(folders.items())]
        return ", ".join([*parts, *filter(None, [self.unreadable])])


async def find_remains(store: Store, target: Target) -> Remains:
    """Return the job's keys. Raises NoSuchJob when there are none, PeerRefused while somebody lives."""
    unreadable = ""
    try:
        items = (await store.list("")).items
    except StoreCorrupt as error:
        unreadable = str(error)
        items = (await store.list(SYNC_PREFIX)).items  # what tells whether somebody lives
    if not items and not unreadable:
        raise NoSuchJob(f"there is nothing of job {target.job_id} in the store at {', '.join(target.store.endpoints)}")
    _refuse_living(items, target)
    return Remains(items=items, unreadable=unreadable)


async def forget(store: Store, target: Target, remains: Remains) -> None:
    """Delete what was found and what came since. Raises as find_remains does."""
    if remains.unreadable:
        await _forget_unreadable(target, remains)
        return
    items = remains.items
    for _ in range(ROUNDS_MAX):
        await _delete(store, items)
        items = (await store.list("")).items
        if not items:
            return
        _refuse_living(items, target)
    raise PeerRefused(f"somebody keeps writing keys of job {target.job_id}; end it first")


def _refuse_living(items: tuple[KeyValue, ...], target: Target) -> None:
    leased = [item.key for item in items if item.lease_id != NO_LEASE]
    if LEADER_KEY in leased:
        raise PeerRefused(f"job {target.job_id} has a living leader: end it first, nothing was deleted")
    nodes = [key.removeprefix(NODES_PREFIX) for key in leased if key.startswith(NODES_PREFIX)]
    if nodes:
        raise PeerRefused(
            f"node {nodes[0]} still holds its lease in job {target.job_id}: end it first, or wait some seconds for "
            "the lease to run out; nothing was deleted"
        )


async def _delete(store: Store, items: tuple[KeyValue, ...]) -> None:
    """Delete in transactions, each only if there is still no other leader and nothing in it has changed."""
    guard = _same_leader(items, LEADER_KEY)
    left = [item for item in items if item.key != LEADER_KEY]
    while left:
        part, left = left[: TXN_OPS_MAX - 1], left[TXN_OPS_MAX - 1 :]
        compares = (guard, *(modified_at(item.key, item.mod_revision) for item in part))
        await store.txn(compares, tuple(Delete(key=item.key) for item in part))
    await store.txn((guard,), (Delete(key=LEADER_KEY),))


async def _forget_unreadable(target: Target, remains: Remains) -> None:
    """Delete by the common prefix, from the namespace above: a key that is not text cannot be named."""
    folder = f"{target.job_id}/"
    if folder == RESERVED_PREFIX:
        raise PeerRefused(f"a job of this name cannot be forgotten here; etcdctl del --prefix {ROOT}/{folder}")
    above = store_access.open_store(target.store, ROOT)
    try:
        guard = _same_leader(remains.items, f"{folder}{LEADER_KEY}")
        result = await above.txn((guard,), (Delete(key=folder, prefix=True),))
    finally:
        await above.close()
    if not result.succeeded:
        raise PeerRefused(f"job {target.job_id} has a new leader: end it first, nothing was deleted")


def _same_leader(items: tuple[KeyValue, ...], key: str) -> Compare:
    """The leader's key is what it was when `items` were listed."""
    return modified_at(key, next((item.mod_revision for item in items if item.key == LEADER_KEY), 0))
