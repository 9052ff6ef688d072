"""What every Store does, as tests that take a store: run against the fake one and against etcd, so that they agree."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

import pytest

from elastic_run.runtime.edge.store import (
    NO_LEASE,
    Compare,
    CompareOp,
    CompareTarget,
    Delete,
    EventKind,
    LeaseId,
    Put,
    Snapshot,
    Store,
    WatchBatch,
    WatchEvent,
    absent,
    created_at,
    follow,
    modified_at,
)
from elastic_run.runtime.protocol.errors import FenceLost, InvariantViolated, StoreCompacted

WAIT_S = 20.0  # a bound, never reached when all is well


@dataclass(frozen=True, slots=True, kw_only=True)
class Harness:
    """`let_expire` makes sure that a lease of the shortest ttl runs out while the test waits for it."""

    store: Store
    let_expire: Callable[[], None]


Contract = Callable[[Harness], Awaitable[None]]


async def put(store: Store, key: str, value: bytes, lease_id: LeaseId = NO_LEASE) -> int:
    result = await store.txn((), (Put(key=key, value=value, lease_id=lease_id),))
    assert result.succeeded
    return result.revision


async def collect(store: Store, prefix: str, from_revision: int, count: int) -> list[WatchEvent]:
    """The first `count` events, or more if a batch brings them."""
    events: list[WatchEvent] = []
    async with asyncio.timeout(WAIT_S), aclosing(store.watch(prefix, from_revision)) as batches:
        async for batch in batches:
            events.extend(batch.events)
            if len(events) >= count:
                break
    return events


async def get_of_a_key_that_is_not_there_is_none(harness: Harness) -> None:
    assert await harness.store.get("nothing") is None


async def put_sets_revisions_and_version(harness: Harness) -> None:
    store = harness.store
    first = await put(store, "a", b"1")
    second = await put(store, "a", b"2")
    kv = await store.get("a")
    assert kv is not None and second > first
    assert (kv.key, kv.value, kv.create_revision, kv.mod_revision, kv.version) == ("a", b"2", first, second, 2)
    assert kv.lease_id == NO_LEASE


async def list_is_sorted_and_knows_its_prefix(harness: Harness) -> None:
    store = harness.store
    for key in ("n/b", "n/a", "n/a/x", "m", "n", "o"):
        await put(store, key, key.encode())
    found = await store.list("n/")
    assert [kv.key for kv in found.items] == ["n/a", "n/a/x", "n/b"]
    assert not found.more
    everything = await store.list("")
    assert [kv.key for kv in everything.items] == ["m", "n", "n/a", "n/a/x", "n/b", "o"]
    short = await store.list("n", limit=2)
    assert [kv.key for kv in short.items] == ["n", "n/a"] and short.more
    exact = await store.list("n/", limit=3)
    assert len(exact.items) == 3 and not exact.more


async def list_spans_several_pages(harness: Harness) -> None:
    store = harness.store
    keys = [f"page/{number:04d}" for number in range(600)]
    for start in range(0, len(keys), 100):
        await store.txn((), [Put(key=key, value=b"v") for key in keys[start : start + 100]])
    assert [kv.key for kv in (await store.list("page/")).items] == keys


async def txn_applies_nothing_when_a_compare_is_false(harness: Harness) -> None:
    store = harness.store
    await put(store, "a", b"1")
    result = await store.txn((absent("a"), absent("b")), (Put(key="b", value=b"x"), Delete(key="a")), ("b", "a"))
    assert not result.succeeded
    nothing, kept = result.current
    assert nothing is None and kept is not None and kept.value == b"1"
    assert await store.get("b") is None


async def txn_applies_all_at_one_revision(harness: Harness) -> None:
    store = harness.store
    await put(store, "old/1", b"")
    await put(store, "old/2", b"")
    result = await store.txn(
        (absent("new"),), (Put(key="new", value=b"n"), Delete(key="old/", prefix=True), Delete(key="never")), ("new",)
    )
    assert result.succeeded and result.current == ()
    found = await store.list("")
    assert [(kv.key, kv.mod_revision) for kv in found.items] == [("new", result.revision)]
    events = await collect(store, "", result.revision, 3)
    assert sorted((event.kv.key, event.kind, event.kv.mod_revision) for event in events) == [
        ("new", EventKind.PUT, result.revision),
        ("old/1", EventKind.DELETE, result.revision),
        ("old/2", EventKind.DELETE, result.revision),
    ]


async def compares_of_every_kind(harness: Harness) -> None:
    store = harness.store
    await put(store, "a", b"b")
    revision = await put(store, "a", b"m")
    kv = await store.get("a")
    assert kv is not None
    numbers = (
        (CompareTarget.VERSION, 2),
        (CompareTarget.MOD_REVISION, revision),
        (CompareTarget.CREATE_REVISION, kv.create_revision),
    )
    truths = [
        (Compare(key="a", target=target, op=op, operand=number + offset), op, -offset)
        for target, number in numbers
        for op in CompareOp
        for offset in (-1, 0, 1)
    ]
    truths += [
        (Compare(key="a", target=CompareTarget.VALUE, op=op, operand=value), op, order)
        for op in CompareOp
        for value, order in ((b"a", 1), (b"m", 0), (b"mm", -1), (b"z", -1))
    ]
    expected = {
        CompareOp.EQUAL: lambda order: order == 0,
        CompareOp.NOT_EQUAL: lambda order: order != 0,
        CompareOp.LESS: lambda order: order < 0,
        CompareOp.GREATER: lambda order: order > 0,
    }
    for compare, op, order in truths:
        assert (await store.txn((compare,), ())).succeeded == expected[op](order), compare


async def a_missing_key_has_version_0_and_no_value(harness: Harness) -> None:
    store = harness.store
    assert (await store.txn((absent("x"), created_at("x", 0), modified_at("x", 0)), ())).succeeded
    for op in CompareOp:
        compare = Compare(key="x", target=CompareTarget.VALUE, op=op, operand=b"")
        assert not (await store.txn((compare,), ())).succeeded, op


async def create_revision_starts_anew_after_a_delete(harness: Harness) -> None:
    store = harness.store
    first = await put(store, "a", b"1")
    await store.txn((), (Delete(key="a"),))
    assert not (await store.txn((created_at("a", first),), ())).succeeded
    again = await put(store, "a", b"1")
    kv = await store.get("a")
    assert kv is not None and kv.create_revision == again > first and kv.version == 1


async def watch_delivers_history_then_news(harness: Harness) -> None:
    store = harness.store
    start = await put(store, "w/a", b"1")
    await put(store, "other", b"-")
    await put(store, "w/a", b"2")
    watching = asyncio.create_task(collect(store, "w/", start, 4))
    await put(store, "w/b", b"3")
    await store.txn((), (Delete(key="w/a"),))
    events = await watching
    assert [(event.kind, event.kv.key, event.kv.value) for event in events] == [
        (EventKind.PUT, "w/a", b"1"),
        (EventKind.PUT, "w/a", b"2"),
        (EventKind.PUT, "w/b", b"3"),
        (EventKind.DELETE, "w/a", b""),
    ]
    before = [event.previous.value if event.previous else None for event in events]
    assert before == [None, b"1", None, b"2"]
    revisions = [event.kv.mod_revision for event in events]
    assert revisions == sorted(set(revisions))


async def watch_from_now_on_skips_the_past(harness: Harness) -> None:
    store = harness.store
    await put(store, "w", b"old")
    async with asyncio.timeout(WAIT_S), aclosing(store.watch("w")) as batches:
        first = asyncio.ensure_future(anext(batches))
        number = 0
        while not first.done():  # only the watch itself can tell when it has begun
            number += 1
            await put(store, "w", b"new%d" % number)
        batch = await first
    assert all(event.kv.value.startswith(b"new") for event in batch.events)


async def watch_of_compacted_history_says_so(harness: Harness) -> None:
    store = harness.store
    first = await put(store, "w", b"1")
    last = await put(store, "w", b"2")
    await store.compact(last)
    with pytest.raises(StoreCompacted) as caught:
        await collect(store, "w", first, 1)
    assert caught.value.revision == last
    await store.compact(last)
    assert [event.kv.value for event in await collect(store, "w", last, 1)] == [b"2"]


async def follow_begins_with_a_snapshot(harness: Harness) -> None:
    store = harness.store
    await put(store, "f/a", b"1")
    seen: list[Snapshot | WatchBatch] = []
    async with asyncio.timeout(WAIT_S), aclosing(follow(store, "f/")) as updates:
        seen.append(await anext(updates))
        await put(store, "f/b", b"2")
        seen.append(await anext(updates))
    snapshot, batch = seen
    assert isinstance(snapshot, Snapshot) and isinstance(batch, WatchBatch)
    assert not snapshot.relisted and [kv.key for kv in snapshot.items] == ["f/a"]
    assert [event.kv.key for event in batch.events] == ["f/b"] and batch.revision > snapshot.revision


async def an_expired_lease_deletes_its_keys(harness: Harness) -> None:
    store = harness.store
    lease_id = await store.lease_grant(1)
    revision = await put(store, "leased", b"v", lease_id)
    await put(store, "kept", b"v")
    kv = await store.get("leased")
    assert kv is not None and kv.lease_id == lease_id
    watching = asyncio.create_task(collect(store, "", revision + 1, 2))
    await asyncio.sleep(0)
    harness.let_expire()
    events = await watching
    assert [(event.kind, event.kv.key) for event in events[1:]] == [(EventKind.DELETE, "leased")]
    with pytest.raises(FenceLost):
        await store.lease_keepalive_once(lease_id)
    with pytest.raises(FenceLost):
        await store.txn((), (Put(key="late", value=b"", lease_id=lease_id),))
    assert await store.get("late") is None


async def a_revoked_lease_deletes_its_keys_at_once(harness: Harness) -> None:
    store = harness.store
    lease_id = await store.lease_grant(60)
    await put(store, "leased", b"v", lease_id)
    assert await store.lease_keepalive_once(lease_id) == 60
    await store.lease_revoke(lease_id)
    assert await store.get("leased") is None
    await store.lease_revoke(lease_id)


async def a_put_without_lease_frees_the_key_of_it(harness: Harness) -> None:
    store = harness.store
    lease_id = await store.lease_grant(60)
    await put(store, "k", b"1", lease_id)
    await put(store, "k", b"2")
    await store.lease_revoke(lease_id)
    kv = await store.get("k")
    assert kv is not None and kv.value == b"2" and kv.lease_id == NO_LEASE


async def what_etcd_would_refuse_is_our_own_mistake(harness: Harness) -> None:
    store = harness.store
    for then in (
        (Put(key="a", value=b""), Put(key="a", value=b"")),
        (Put(key="a/b", value=b""), Delete(key="a/", prefix=True)),
        (Put(key="", value=b""),),
        (Put(key="writers/x", value=b""),),
        (Delete(key="", prefix=True),),
        (Put(key="big", value=bytes(1024 * 1024 + 1)),),
    ):
        with pytest.raises(InvariantViolated):
            await store.txn((), then)
    assert (await store.list("")).items == ()


async def the_store_tells_its_state(harness: Harness) -> None:
    store = harness.store
    revision = await put(store, "a", b"1")
    status = await store.status()
    assert status.revision >= revision and status.leader_id != 0 and status.stored_bytes > 0
    assert status.member_id in {member.member_id for member in await store.members()}


CONTRACTS: tuple[Contract, ...] = (
    get_of_a_key_that_is_not_there_is_none,
    put_sets_revisions_and_version,
    list_is_sorted_and_knows_its_prefix,
    list_spans_several_pages,
    txn_applies_nothing_when_a_compare_is_false,
    txn_applies_all_at_one_revision,
    compares_of_every_kind,
    a_missing_key_has_version_0_and_no_value,
    create_revision_starts_anew_after_a_delete,
    watch_delivers_history_then_news,
    watch_from_now_on_skips_the_past,
    watch_of_compacted_history_says_so,
    follow_begins_with_a_snapshot,
    an_expired_lease_deletes_its_keys,
    a_revoked_lease_deletes_its_keys_at_once,
    a_put_without_lease_frees_the_key_of_it,
    what_etcd_would_refuse_is_our_own_mistake,
    the_store_tells_its_state,
)
