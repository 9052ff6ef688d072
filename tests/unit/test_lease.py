from fake_store import Clock, FakeServer, FakeStore

from elastic_run.runtime.edge.lease import LeaseKeeper
from elastic_run.runtime.edge.store import LeaseId

TTL_S = 4


async def _leased() -> tuple[FakeStore, Clock, LeaseId]:
    clock = Clock()
    store = FakeStore(FakeServer(clock))
    return store, clock, await store.lease_grant(TTL_S)


def _keeper(store: FakeStore, clock: Clock, lease_id: LeaseId, told: list[str]) -> LeaseKeeper:
    return LeaseKeeper(
        store, lease_id, TTL_S, granted_at_s=clock(), on_lost=told.append, clock=clock, sleep=clock.sleep
    )


async def test_a_kept_lease_outlives_its_time_to_live_many_times() -> None:
    store, clock, lease_id = await _leased()
    told: list[str] = []
    async with _keeper(store, clock, lease_id, told) as keeper:
        for lived in range(1, 20):
            await clock.reached(1000.0 + lived * TTL_S)
            assert keeper.held()
    assert told == []
    assert await store.lease_keepalive_once(lease_id) == TTL_S


async def test_a_revoked_lease_is_lost_at_the_next_renewal() -> None:
    store, clock, lease_id = await _leased()
    told: list[str] = []
    await store.lease_revoke(lease_id)
    keeper = _keeper(store, clock, lease_id, told)
    await keeper.run()
    assert keeper.lost.is_set() and not keeper.held() and clock() < 1000.0 + TTL_S
    assert told == [keeper.reason] and "gone" in keeper.reason


async def test_a_lease_is_lost_by_our_own_clock_when_the_store_is_away() -> None:
    store, clock, lease_id = await _leased()
    told: list[str] = []
    store.set_cut(True)
    keeper = _keeper(store, clock, lease_id, told)
    await keeper.run()
    assert keeper.lost.is_set() and len(told) == 1
    assert clock() == 1000.0 + TTL_S
    assert "away" in keeper.reason


async def test_a_lease_is_not_held_after_a_pause_of_the_whole_process() -> None:
    store, clock, lease_id = await _leased()
    keeper = _keeper(store, clock, lease_id, [])
    assert keeper.held()
    clock.advance(TTL_S)
    assert not keeper.held()
    await keeper.run()
    assert keeper.lost.is_set()


async def test_an_outage_shorter_than_the_time_to_live_loses_nothing() -> None:
    store, clock, lease_id = await _leased()
    told: list[str] = []
    async with _keeper(store, clock, lease_id, told) as keeper:
        store.set_cut(True)
        await clock.reached(1000.0 + TTL_S * 0.75)
        store.set_cut(False)
        await clock.reached(1000.0 + TTL_S * 4)
        assert keeper.held()
    assert told == []
