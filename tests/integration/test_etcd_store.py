"""The etcd client against real etcd: the store contract, TLS, users, deadlines, fragments."""

import asyncio
import base64
import logging
import socket
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
from etcd_cluster import EtcdCluster, TlsFiles, free_ports, make_tls_files
from store_contract import CONTRACTS, WAIT_S, Contract, Harness, collect, put

from elastic_run.runtime.edge.election import campaign, fenced_txn, resign
from elastic_run.runtime.edge.etcd import EtcdStore
from elastic_run.runtime.edge.etcd_config import EtcdConfig
from elastic_run.runtime.edge.store import Delete, Put, Snapshot, Store, WatchBatch, follow, modified_at
from elastic_run.runtime.protocol.errors import (
    FenceLost,
    StoreCorrupt,
    StoreDenied,
    StoreUnavailable,
    UserError,
)

pytestmark = pytest.mark.slow

NAMESPACE = "/elastic/test"


@asynccontextmanager
async def opened(config: EtcdConfig) -> AsyncGenerator[EtcdStore, None]:
    store = EtcdStore(config)
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with EtcdCluster(directory=tmp_path_factory.mktemp("etcd")) as running:
        yield running


@pytest.fixture
def config(cluster: EtcdCluster, request: pytest.FixtureRequest) -> EtcdConfig:
    """A namespace of the test's own."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    return EtcdConfig(endpoints=cluster.endpoints, namespace=f"/elastic/{name}")


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.__name__)
async def test_etcd_store_keeps_the_contract(contract: Contract, config: EtcdConfig) -> None:
    async with opened(config) as store:
        typed: Store = store
        await contract(Harness(store=typed, let_expire=lambda: None))


async def test_close_removes_the_marker_and_nothing_else(config: EtcdConfig, cluster: EtcdCluster) -> None:
    async with opened(config) as store:
        await put(store, "kept", b"")
        async with opened(EtcdConfig(endpoints=cluster.endpoints, namespace="/elastic")) as above:
            inside = config.namespace.removeprefix("/elastic/")
            before = [kv.key for kv in (await above.list(inside)).items]
            assert len(before) == 2 and any("/writers/" in key for key in before)
    async with opened(EtcdConfig(endpoints=cluster.endpoints, namespace="/elastic")) as above:
        assert [kv.key for kv in (await above.list(inside)).items] == [f"{inside}/kept"]


async def test_writing_goes_on_after_somebody_deleted_the_marker(config: EtcdConfig, cluster: EtcdCluster) -> None:
    inside = config.namespace.removeprefix("/elastic/")
    async with opened(config) as store, opened(EtcdConfig(endpoints=cluster.endpoints, namespace="/elastic")) as above:
        await put(store, "k", b"1")
        await above.txn((), (Delete(key=f"{inside}/writers/", prefix=True),))
        await put(store, "k", b"2")
        kv = await store.get("k")
        assert kv is not None and (kv.value, kv.version) == (b"2", 2)


async def test_two_namespaces_never_see_each_other(config: EtcdConfig, cluster: EtcdCluster) -> None:
    other = EtcdConfig(endpoints=cluster.endpoints, namespace=config.namespace + "2")
    async with opened(config) as one, opened(other) as two:
        await put(one, "k", b"1")
        await put(two, "k", b"2")
        await one.txn((), (Delete(key="k"),))
        assert (await one.list("")).items == ()
        kept = await two.get("k")
        assert kept is not None and kept.value == b"2"


async def test_a_foreign_key_that_is_not_text_is_one_clear_error(config: EtcdConfig, cluster: EtcdCluster) -> None:
    key = base64.b64encode(config.namespace.encode() + b"/x\xff").decode()
    await asyncio.to_thread(cluster.api, "kv/put", {"key": key, "value": ""})
    async with opened(config) as store:
        with pytest.raises(StoreCorrupt, match="not UTF-8"):
            await store.list("")


async def test_concurrent_writers_lose_no_increment(config: EtcdConfig) -> None:
    async def increment(store: Store, times: int) -> None:
        for _ in range(times):
            while True:
                kv = await store.get("n")
                assert kv is not None
                value = b"%d" % (int(kv.value) + 1)
                if (await store.txn((modified_at("n", kv.mod_revision),), (Put(key="n", value=value),))).succeeded:
                    break

    async with opened(config) as one, opened(config) as two:
        await put(one, "n", b"0")
        await asyncio.gather(*(increment(store, 10) for store in (one, one, two, two)))
        total = await one.get("n")
        assert total is not None and total.value == b"40"


async def test_large_transactions_arrive_whole_though_etcd_sends_fragments(config: EtcdConfig) -> None:
    async with opened(config) as store:
        big = bytes(300_000)
        start = 0
        for number in range(12):
            result = await store.txn((), [Put(key=f"big/{number}/{half}", value=big) for half in (0, 1)])
            start = start or result.revision
        async with asyncio.timeout(WAIT_S), aclosing(store.watch("big/", start)) as batches:
            seen: list[tuple[str, int]] = []
            async for batch in batches:
                revisions = [event.kv.mod_revision for event in batch.events]
                assert all(revisions.count(revision) == 2 for revision in revisions)
                seen.extend((event.kv.key, len(event.kv.value)) for event in batch.events)
                if len(seen) >= 24:
                    break
        assert seen == [(f"big/{number}/{half}", 300_000) for number in range(12) for half in (0, 1)]


async def test_follow_lists_again_after_a_compaction(config: EtcdConfig, cluster: EtcdCluster) -> None:
    """What comes between the snapshot and the first read of the watch is compacted away."""
    async with opened(config) as store, opened(config) as other:
        await put(store, "f/a", b"1")
        async with asyncio.timeout(WAIT_S), aclosing(follow(store, "f/")) as updates:
            first = await anext(updates)
            assert isinstance(first, Snapshot) and not first.relisted
            await put(other, "f/b", b"2")
            last = await put(other, "f/b", b"3")
            await other.compact(last)
            repaired = await anext(updates)
            assert isinstance(repaired, Snapshot) and repaired.relisted
            assert [(kv.key, kv.value) for kv in repaired.items] == [("f/a", b"1"), ("f/b", b"3")]
            await put(other, "f/c", b"4")
            news = await anext(updates)
            assert isinstance(news, WatchBatch) and news.events[0].kv.key == "f/c"


async def test_a_leader_hands_over_on_a_real_cluster(config: EtcdConfig) -> None:
    async with opened(config) as one, opened(config) as two:
        first = await campaign(one, key="leader", value=b"1", lease_id=await one.lease_grant(60))
        lease_id = await two.lease_grant(60)
        waiting = asyncio.create_task(campaign(two, key="leader", value=b"2", lease_id=lease_id))
        assert await resign(one, first)
        second = await asyncio.wait_for(waiting, WAIT_S)
        assert second.token > first.token
        with pytest.raises(FenceLost):
            await fenced_txn(one, first, (), (Put(key="plan", value=b"stale"),))
        assert (await fenced_txn(two, second, (), (Put(key="plan", value=b"fresh"),))).succeeded


async def test_dead_endpoints_beside_a_living_one_do_no_harm(config: EtcdConfig, cluster: EtcdCluster) -> None:
    dead = tuple(f"127.0.0.1:{port}" for port in free_ports(2))
    mixed = EtcdConfig(endpoints=(*dead, cluster.endpoints[1]), namespace=config.namespace)
    async with opened(mixed) as store:
        revision = await put(store, "k", b"1")
        assert await collect(store, "k", revision, 1)


async def test_no_endpoint_is_unavailable_within_the_deadline() -> None:
    silent = socket.socket()  # accepts into its backlog and never says a word
    try:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for port in (free_ports(1)[0], silent.getsockname()[1]):
            config = EtcdConfig(endpoints=(f"127.0.0.1:{port}",), namespace=NAMESPACE)
            async with opened(config) as store:
                begun = time.monotonic()
                with pytest.raises(StoreUnavailable, match=f"127.0.0.1:{port}"):
                    await store.get("k", deadline_s=1.0)
                with pytest.raises(StoreUnavailable):
                    await store.txn((), (Put(key="k", value=b""),), deadline_s=1.0)
                with pytest.raises(StoreUnavailable):
                    await anext(store.watch("k", patience_s=0.5))
                assert time.monotonic() - begun < 15.0  # six times the deadlines: a hang would last for ever
    finally:
        silent.close()


def test_a_store_is_made_without_a_loop_and_without_any_io() -> None:
    EtcdStore(EtcdConfig(endpoints=("no.such.host.invalid:1",), namespace=NAMESPACE, ca_file=Path("/no/such/file")))


async def test_tls_with_client_certificates(tmp_path: Path) -> None:
    tls = make_tls_files(tmp_path)
    with EtcdCluster(directory=tmp_path, size=1, tls=tls) as secure:
        good = EtcdConfig(
            endpoints=secure.endpoints,
            namespace=NAMESPACE,
            ca_file=tls.ca_file,
            cert_file=tls.client_cert_file,
            key_file=tls.client_key_file,
        )
        async with opened(good) as store:
            revision = await put(store, "k", b"secret")
            assert (await collect(store, "k", revision, 1))[0].kv.value == b"secret"
        for bad in (
            EtcdConfig(endpoints=secure.endpoints, namespace=NAMESPACE),
            EtcdConfig(endpoints=secure.endpoints, namespace=NAMESPACE, ca_file=tls.ca_file),
            _with_other_authority(good, tmp_path),
        ):
            async with opened(bad) as store:
                with pytest.raises(StoreUnavailable):
                    await store.get("k", deadline_s=1.0)
        missing = EtcdConfig(endpoints=secure.endpoints, namespace=NAMESPACE, ca_file=tmp_path / "missing.pem")
        async with opened(missing) as store:
            with pytest.raises(UserError, match=r"missing\.pem"):
                await store.get("k")


def _with_other_authority(good: EtcdConfig, tmp_path: Path) -> EtcdConfig:
    elsewhere = tmp_path / "other"
    elsewhere.mkdir()
    other: TlsFiles = make_tls_files(elsewhere)
    return EtcdConfig(
        endpoints=good.endpoints,
        namespace=NAMESPACE,
        ca_file=other.ca_file,
        cert_file=good.cert_file,
        key_file=good.key_file,
    )


async def test_user_and_password(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    password = "correct horse battery"
    with EtcdCluster(directory=tmp_path, size=1) as guarded, caplog.at_level(logging.DEBUG):
        config = EtcdConfig(endpoints=guarded.endpoints, namespace=NAMESPACE, user="agent", password=password)
        async with opened(config) as early:
            await put(early, "k", b"0")  # authentication is still off: the user is not asked for
            await asyncio.to_thread(guarded.enable_users, "agent", password, NAMESPACE)
            await put(early, "k", b"1")
        async with opened(config) as store:
            revision = await put(store, "k", b"2")
            async with asyncio.timeout(WAIT_S), aclosing(store.watch("k", revision)) as batches:
                assert (await anext(batches)).events[0].kv.value == b"2"
                guarded.kill(0)  # tokens live in the member's memory: all are void now
                guarded.restart(0)
                await asyncio.to_thread(guarded.wait_healthy, (0,))
                await put(store, "k", b"3")
                assert (await anext(batches)).events[0].kv.value == b"3"
        wrong = EtcdConfig(endpoints=guarded.endpoints, namespace=NAMESPACE, user="agent", password="wrong")
        nobody = EtcdConfig(endpoints=guarded.endpoints, namespace=NAMESPACE)
        elsewhere = EtcdConfig(endpoints=guarded.endpoints, namespace="/other", user="agent", password=password)
        for denied in (wrong, nobody, elsewhere):
            async with opened(denied) as store:
                with pytest.raises(StoreDenied) as told:
                    await store.get("k")
                assert "wrong" not in str(told.value) and password not in str(told.value)
                with pytest.raises(StoreDenied):
                    await put(store, "k", b"")
                with pytest.raises(StoreDenied):
                    await anext(store.watch("k"))
    assert password not in caplog.text and password not in repr(config)
