"""The etcd client while members are killed, stopped, cut off: every write is seen exactly once and in order."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import pytest
from blackhole import CLIENT, Links, PeerLinks
from etcd_cluster import EtcdCluster, free_ports

from elastic_run.runtime.edge.etcd import EtcdStore
from elastic_run.runtime.edge.etcd_config import EtcdConfig
from elastic_run.runtime.edge.lease import LeaseKeeper
from elastic_run.runtime.edge.store import Put, Store, modified_at
from elastic_run.runtime.protocol.errors import StoreUnavailable, StoreUncertain

pytestmark = pytest.mark.slow

NAMESPACE = "/elastic/faults"
DEADLINE_S = 20.0  # never reached: an election here takes a third of a second
WAIT_S = 60.0
KEY = "n"

Fault = Callable[[], Awaitable[None]]


async def write(store: Store, count: int, faults: Mapping[int, Fault]) -> list[int]:
    """`count` writes to one key, each on condition of the one before; the fault of a number comes just before it."""
    revision = 0
    revisions: list[int] = []
    for number in range(count):
        if number in faults:
            await faults[number]()
        put = Put(key=KEY, value=b"%d" % number)
        result = await store.txn((modified_at(KEY, revision),), (put,), (KEY,), deadline_s=DEADLINE_S)
        assert result.succeeded, f"write {number}: somebody else wrote {result.current}"
        revision = result.revision
        revisions.append(revision)
    return revisions


class Progress:
    """What each watcher has seen last."""

    def __init__(self, watchers: int) -> None:
        self._last = [-1] * watchers
        self._moved = asyncio.Condition()

    async def note(self, watcher: int, number: int) -> None:
        async with self._moved:
            self._last[watcher] = number
            self._moved.notify_all()

    async def until_all_saw(self, number: int) -> None:
        async with self._moved:
            await self._moved.wait_for(lambda: min(self._last) >= number)


async def read(store: Store, count: int, watcher: int, progress: Progress) -> list[tuple[int, bytes]]:
    seen: list[tuple[int, bytes]] = []
    async with aclosing(store.watch(KEY, 1)) as batches:
        async for batch in batches:
            seen.extend((event.kv.mod_revision, event.kv.value) for event in batch.events)
            await progress.note(watcher, int(seen[-1][1]))
            if seen[-1][1] == b"%d" % (count - 1):
                return seen
    raise AssertionError("a watch has no end")


async def write_under_faults(
    endpoints: tuple[str, ...], count: int, faults: Mapping[int, Fault], progress: Progress | None = None
) -> None:
    """One writer, and a watcher beginning at each of the endpoints."""
    progress = progress if progress is not None else Progress(len(endpoints))
    async with asyncio.timeout(WAIT_S), AsyncExitStack() as stack:
        stores: list[EtcdStore] = []
        for turn in range(len(endpoints)):
            turned = (*endpoints[turn:], *endpoints[:turn])
            stores.append(EtcdStore(EtcdConfig(endpoints=turned, namespace=NAMESPACE)))
            stack.push_async_callback(stores[-1].close)
        async with asyncio.TaskGroup() as group:
            watching = [
                group.create_task(read(store, count, watcher, progress)) for watcher, store in enumerate(stores)
            ]
            writing = group.create_task(write(stores[0], count, faults))
        written = [(revision, b"%d" % number) for number, revision in enumerate(writing.result())]
        for watched in watching:
            assert watched.result() == written
        final = await stores[-1].get(KEY)
        assert final is not None and final.version == count


async def test_writes_survive_members_killed_and_restarted(tmp_path: Path) -> None:
    with EtcdCluster(directory=tmp_path) as cluster:
        victims: list[int] = []

        async def kill_leader() -> None:
            victims.append(await asyncio.to_thread(cluster.leader))
            cluster.kill(victims[-1])

        async def kill_first() -> None:
            victims.append(0)
            cluster.kill(0)

        async def bring_back() -> None:
            cluster.restart(victims[-1])

        async def settle() -> None:
            await asyncio.to_thread(cluster.wait_healthy, range(3))

        faults = {40: kill_leader, 90: bring_back, 130: settle, 140: kill_first, 190: bring_back, 230: settle}
        faults |= {240: kill_leader, 290: bring_back}
        await write_under_faults(cluster.endpoints, 320, faults)


async def test_writes_survive_members_stopped_and_continued(tmp_path: Path) -> None:
    with EtcdCluster(directory=tmp_path) as cluster:
        victims: list[int] = []

        async def stop_leader() -> None:
            victims.append(await asyncio.to_thread(cluster.leader))
            cluster.pause(victims[-1])

        async def stop_first() -> None:
            victims.append(0)
            cluster.pause(0)

        async def catch_up() -> None:
            await progress.until_all_saw(89)  # the member is still stopped: its watcher must have left it

        async def resume() -> None:
            cluster.resume(victims[-1])
            await asyncio.to_thread(cluster.wait_healthy, range(3))

        progress = Progress(3)
        faults = {
            40: stop_first,
            90: catch_up,
            91: resume,
            120: stop_leader,
            170: resume,
            200: stop_leader,
            250: resume,
        }
        await write_under_faults(cluster.endpoints, 280, faults, progress)


async def test_writes_survive_members_cut_off_from_each_other_and_from_us(tmp_path: Path) -> None:
    peer_ports = tuple(free_ports(3))
    links = Links()
    async with AsyncExitStack() as stack:
        cluster: EtcdCluster | None = None

        def pid_of(member: int) -> int:
            assert cluster is not None
            return cluster.pid(member)

        forwarders = await stack.enter_async_context(PeerLinks(links, pid_of, 3))
        advertised = [await forwarders.before_peer(index, port) for index, port in enumerate(peer_ports)]
        cluster = EtcdCluster(
            directory=tmp_path,
            peer_ports=peer_ports,
            peer_urls=tuple(f"http://127.0.0.1:{port}" for port in advertised),
        )
        stack.callback(cluster.close)
        for index in range(3):
            cluster.restart(index)
        await asyncio.to_thread(cluster.wait_healthy, range(3))
        fronts = [
            await forwarders.before_client(index, member.client_port) for index, member in enumerate(cluster.members)
        ]

        async def isolate_leader() -> None:
            leader = await asyncio.to_thread(cluster.leader)
            for other in range(3):
                if other != leader:
                    links.cut(leader, other)

        async def isolate_first() -> None:
            links.cut(0, 1)
            links.cut(0, 2)

        async def hide_first_from_us() -> None:
            links.cut(CLIENT, 0)

        async def mute_others() -> None:
            links.mute(0, CLIENT)
            links.mute(1, CLIENT)

        async def mute_the_one_in_use() -> None:
            links.heal()
            links.mute(2, CLIENT)  # it hears us and does what we say, but we hear nothing

        async def heal() -> None:
            links.heal()
            await asyncio.to_thread(cluster.wait_healthy, range(3))

        faults = {40: isolate_leader, 80: heal, 120: hide_first_from_us, 160: heal, 200: isolate_first, 240: heal}
        faults |= {280: mute_others, 300: mute_the_one_in_use, 320: heal}
        await write_under_faults(tuple(f"127.0.0.1:{port}" for port in fronts), 360, faults)


async def test_a_lost_answer_is_read_off_the_marker(tmp_path: Path) -> None:
    """Two ways lead to one member; what was asked over the way that is mute took effect, and is asked again."""
    links = Links()
    async with AsyncExitStack() as stack:
        cluster = stack.enter_context(EtcdCluster(directory=tmp_path, size=1))
        forwarders = await stack.enter_async_context(PeerLinks(links, cluster.pid, 1))
        ways = [await forwarders.before_client(way, cluster.members[0].client_port) for way in (0, 1)]
        config = EtcdConfig(endpoints=tuple(f"127.0.0.1:{port}" for port in ways), namespace=NAMESPACE)
        store = EtcdStore(config)
        stack.push_async_callback(store.close)
        first = await store.txn((), (Put(key=KEY, value=b"1"),))

        links.mute(0, CLIENT)
        second = await store.txn((modified_at(KEY, first.revision),), (Put(key=KEY, value=b"2"),), (KEY,))
        kv = await store.get(KEY)
        assert second.succeeded and kv is not None
        assert (kv.value, kv.version, kv.mod_revision) == (b"2", 2, second.revision)

        links.heal()
        links.mute(1, CLIENT)
        third = await store.txn((modified_at(KEY, first.revision),), (Put(key=KEY, value=b"3"),), (KEY,))
        assert not third.succeeded and third.current == (kv,) and third.revision > second.revision
        links.heal()
        assert await store.get(KEY) == kv


async def test_an_outage_of_the_whole_store_ends_calls_in_time_and_loses_nothing(tmp_path: Path) -> None:
    with EtcdCluster(directory=tmp_path, size=1) as cluster:
        config = EtcdConfig(endpoints=cluster.endpoints, namespace=NAMESPACE)
        store, watcher = EtcdStore(config), EtcdStore(config)
        try:
            async with asyncio.timeout(WAIT_S), aclosing(watcher.watch(KEY, 1)) as batches:
                await store.txn((), (Put(key=KEY, value=b"0"),))
                assert (await anext(batches)).events[0].kv.value == b"0"
                cluster.kill(0)
                with pytest.raises(StoreUnavailable):
                    await store.get(KEY, deadline_s=0.3)
                with pytest.raises(StoreUnavailable):  # the connection is known to be gone: nothing was sent
                    await store.txn((), (Put(key=KEY, value=b"never sent"),), deadline_s=0.3)
                cluster.restart(0)
                await asyncio.to_thread(cluster.wait_healthy, (0,))
                await store.txn((), (Put(key=KEY, value=b"1"),), deadline_s=DEADLINE_S)
                cluster.pause(0)
                sent, waiting = await asyncio.gather(
                    store.txn((), (Put(key=KEY, value=b"maybe"),), deadline_s=1.0),
                    store.txn((), (Put(key=KEY, value=b"never sent"),), deadline_s=0.9),
                    return_exceptions=True,
                )
                assert isinstance(sent, StoreUncertain) and isinstance(waiting, StoreUnavailable)
                cluster.resume(0)
                await store.txn((), (Put(key=KEY, value=b"2"),), deadline_s=DEADLINE_S)
                seen: list[bytes] = []
                while b"2" not in seen:
                    seen.extend(event.kv.value for event in (await anext(batches)).events)
                assert [value for value in seen if value != b"maybe"] == [b"1", b"2"]
                assert seen.count(b"maybe") <= 1 and seen[-1] == b"2"
        finally:
            await store.close()
            await watcher.close()


async def test_a_lease_is_kept_through_the_death_of_the_leader_and_lost_with_the_cluster(tmp_path: Path) -> None:
    with EtcdCluster(directory=tmp_path) as cluster:
        store = EtcdStore(EtcdConfig(endpoints=cluster.endpoints, namespace=NAMESPACE))
        try:
            loop = asyncio.get_running_loop()
            granted_at_s = loop.time()
            lease_id = await store.lease_grant(2)
            async with LeaseKeeper(store, lease_id, 2, granted_at_s=granted_at_s, clock=loop.time) as keeper:
                await store.txn((), (Put(key="node", value=b"", lease_id=lease_id),))
                cluster.kill(await asyncio.to_thread(cluster.leader))
                dies_at_s = loop.time() + 3.0  # past the lease's time to live
                async with asyncio.timeout(WAIT_S):
                    while loop.time() < dies_at_s:
                        assert await store.get("node", deadline_s=DEADLINE_S) is not None
                assert keeper.held()
                for index, member in enumerate(cluster.members):
                    if member.process is not None:
                        cluster.kill(index)
                async with asyncio.timeout(WAIT_S):
                    await keeper.lost.wait()
                assert not keeper.held()
        finally:
            await store.close()
