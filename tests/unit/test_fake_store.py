import asyncio
from contextlib import aclosing

import pytest
from fake_store import Clock, FakeServer, FakeStore
from store_contract import CONTRACTS, Contract, Harness, put

from elastic_run.runtime.edge.store import Put, Snapshot, Store, WatchBatch, follow
from elastic_run.runtime.protocol.errors import StoreUnavailable, StoreUncertain


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.__name__)
async def test_fake_store_keeps_the_contract(contract: Contract) -> None:
    clock = Clock()
    server = FakeServer(clock)

    def let_expire() -> None:
        clock.advance(2.0)
        server.tick()

    store: Store = FakeStore(server)
    await contract(Harness(store=store, let_expire=let_expire))


async def test_an_outage_stops_calls_and_delays_watches_but_loses_nothing() -> None:
    server = FakeServer()
    here, there = FakeStore(server), FakeStore(server)
    async with aclosing(here.watch("k")) as batches:
        arriving = asyncio.ensure_future(anext(batches))
        await asyncio.sleep(0)
        here.set_cut(True)
        await put(there, "k", b"1")
        with pytest.raises(StoreUnavailable):
            await here.get("k")
        assert not arriving.done()
        here.set_cut(False)
        assert (await arriving).events[0].kv.value == b"1"


async def test_a_watch_gives_up_after_its_patience() -> None:
    store = FakeStore()
    store.server.set_down(True)
    with pytest.raises(StoreUnavailable):
        await anext(store.watch("k", patience_s=0.0))


async def test_no_lease_expires_during_an_outage_and_all_start_anew_after_it() -> None:
    clock = Clock()
    store = FakeStore(FakeServer(clock))
    lease_id = await store.lease_grant(5)
    await put(store, "k", b"", lease_id)
    store.server.set_down(True)
    clock.advance(60.0)
    store.server.set_down(False)
    clock.advance(4.0)
    assert await store.get("k") is not None
    clock.advance(2.0)
    assert await store.get("k") is None


async def test_a_lost_answer_is_uncertain_whether_or_not_the_write_happened() -> None:
    store = FakeStore()
    store.lose_answer = "applied"
    with pytest.raises(StoreUncertain):
        await store.txn((), (Put(key="a", value=b""),))
    store.lose_answer = "dropped"
    with pytest.raises(StoreUncertain):
        await store.txn((), (Put(key="b", value=b""),))
    assert [kv.key for kv in (await store.list("")).items] == ["a"]


async def test_follow_marks_the_snapshot_that_repairs_a_gap() -> None:
    store = FakeStore()
    await put(store, "f/a", b"1")
    async with aclosing(follow(store, "f/")) as updates:
        first = await anext(updates)
        revision = await put(store, "f/b", b"2")
        await put(store, "f/b", b"3")
        await store.compact(revision + 1)
        repaired = await anext(updates)
        await put(store, "f/c", b"4")
        news = await anext(updates)
    assert isinstance(first, Snapshot) and not first.relisted
    assert isinstance(repaired, Snapshot) and repaired.relisted
    assert [(kv.key, kv.value) for kv in repaired.items] == [("f/a", b"1"), ("f/b", b"3")]
    assert isinstance(news, WatchBatch) and news.events[0].kv.key == "f/c"
