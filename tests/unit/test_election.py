import asyncio

import pytest
from fake_store import Clock, FakeServer, FakeStore
from store_contract import put

from elastic_run.runtime.edge.election import Fence, campaign, fenced_txn, resign, until_lost
from elastic_run.runtime.edge.store import LeaseId, Put, absent
from elastic_run.runtime.protocol.errors import FenceLost, StoreUncertain

KEY = "leader"


async def _candidate(server: FakeServer) -> tuple[FakeStore, LeaseId]:
    store = FakeStore(server)
    return store, await store.lease_grant(5)


async def _settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_free_key_is_taken_at_once_and_its_revision_is_the_token() -> None:
    store, lease_id = await _candidate(FakeServer())
    fence = await campaign(store, key=KEY, value=b"one", lease_id=lease_id)
    holder = await store.get(KEY)
    assert holder is not None and holder.value == b"one"
    assert fence == Fence(key=KEY, token=holder.create_revision)


async def test_a_candidate_waits_until_the_leader_resigns() -> None:
    server = FakeServer()
    one, one_lease = await _candidate(server)
    two, two_lease = await _candidate(server)
    first = await campaign(one, key=KEY, value=b"one", lease_id=one_lease)
    waiting = asyncio.create_task(campaign(two, key=KEY, value=b"two", lease_id=two_lease))
    await put(one, "leader2", b"another key with the same beginning")
    await put(one, KEY, b"one again", one_lease)
    await _settle()
    assert not waiting.done()
    assert await resign(one, first)
    second = await waiting
    assert second.token > first.token
    assert not await resign(one, first)
    assert await two.get(KEY) is not None


async def test_a_deposed_leader_writes_nothing() -> None:
    clock = Clock()
    server = FakeServer(clock)
    one, one_lease = await _candidate(server)
    two = FakeStore(server)
    first = await campaign(one, key=KEY, value=b"one", lease_id=one_lease)
    clock.advance(6.0)
    second = await campaign(two, key=KEY, value=b"two", lease_id=await two.lease_grant(5))
    with pytest.raises(FenceLost, match=f"token {second.token}, not by token {first.token}"):
        await fenced_txn(one, first, (), (Put(key="plan", value=b"stale"),))
    assert (await fenced_txn(two, second, (), (Put(key="plan", value=b"fresh"),))).succeeded
    plan = await two.get("plan")
    assert plan is not None and plan.value == b"fresh"


async def test_fenced_txn_tells_its_own_false_compares_from_a_lost_fence() -> None:
    store, lease_id = await _candidate(FakeServer())
    fence = await campaign(store, key=KEY, value=b"", lease_id=lease_id)
    await put(store, "plan", b"there")
    result = await fenced_txn(store, fence, (absent("plan"),), (Put(key="plan", value=b"x"),), ("plan",))
    assert not result.succeeded and len(result.current) == 1
    assert result.current[0] is not None and result.current[0].value == b"there"


async def test_loss_is_discovered_when_the_lease_expires() -> None:
    clock = Clock()
    server = FakeServer(clock)
    store, lease_id = await _candidate(server)
    fence = await campaign(store, key=KEY, value=b"", lease_id=lease_id)
    losing = asyncio.create_task(until_lost(store, fence))
    await _settle()
    assert not losing.done()
    clock.advance(6.0)
    server.tick()
    await losing


async def test_loss_is_discovered_at_once_by_a_leader_replaced_before_it_looked() -> None:
    server = FakeServer()
    store, lease_id = await _candidate(server)
    fence = await campaign(store, key=KEY, value=b"", lease_id=lease_id)
    await resign(store, fence)
    other, other_lease = await _candidate(server)
    await campaign(other, key=KEY, value=b"", lease_id=other_lease)
    await until_lost(store, fence)


@pytest.mark.parametrize("fate", ["applied", "dropped"])
async def test_a_campaign_survives_a_lost_answer(fate: str) -> None:
    store, lease_id = await _candidate(FakeServer())
    store.lose_answer = "applied" if fate == "applied" else "dropped"
    fence = await campaign(store, key=KEY, value=b"", lease_id=lease_id)
    assert (await fenced_txn(store, fence, (), (Put(key="a", value=b""),))).succeeded


async def test_a_cancelled_campaign_is_continued_with_the_same_lease() -> None:
    server = FakeServer()
    one, one_lease = await _candidate(server)
    two, two_lease = await _candidate(server)
    first = await campaign(one, key=KEY, value=b"", lease_id=one_lease)
    waiting = asyncio.create_task(campaign(two, key=KEY, value=b"", lease_id=two_lease))
    await _settle()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await resign(one, first)
    won = await campaign(two, key=KEY, value=b"", lease_id=two_lease)
    assert await campaign(two, key=KEY, value=b"", lease_id=two_lease) == won


async def test_a_campaign_with_a_lease_that_is_gone_is_refused() -> None:
    store, lease_id = await _candidate(FakeServer())
    await store.lease_revoke(lease_id)
    with pytest.raises(FenceLost):
        await campaign(store, key=KEY, value=b"", lease_id=lease_id)


async def test_a_campaign_gives_up_after_answers_were_lost_too_often() -> None:
    class Deaf(FakeStore):
        async def _reach(self) -> None:
            self.lose_answer = "dropped"
            await super()._reach()

    store = Deaf()
    with pytest.raises(StoreUncertain):
        await campaign(store, key=KEY, value=b"", lease_id=await FakeStore(store.server).lease_grant(5))


async def test_a_compaction_does_not_hide_the_leaders_end() -> None:
    server = FakeServer()
    one, one_lease = await _candidate(server)
    two, two_lease = await _candidate(server)
    first = await campaign(one, key=KEY, value=b"", lease_id=one_lease)
    two.set_cut(False)
    waiting = asyncio.create_task(campaign(two, key=KEY, value=b"", lease_id=two_lease))
    await _settle()
    two.set_cut(True)
    await resign(one, first)
    await put(one, "x", b"")
    await one.compact(server.revision)
    two.set_cut(False)
    assert (await waiting).token > first.token
