"""Which node leases the leader hears of."""

from collections.abc import AsyncIterator, Sequence

from elastic_run.controller.node_leases import NodeLeases
from elastic_run.runtime.edge.store import NO_LEASE, EventKind, KeyValue, Snapshot, WatchBatch, WatchEvent
from elastic_run.runtime.protocol import codec
from elastic_run.runtime.protocol.ids import Incarnation, NodeId
from elastic_run.runtime.protocol.records import NodeRecord, node_key


def record_of(name: str, incarnation: str = "1") -> NodeRecord:
    return NodeRecord(node=NodeId(name), incarnation=Incarnation(incarnation), address="x", nproc=1)


def entry(record: NodeRecord, value: bytes | None = None) -> KeyValue:
    return KeyValue(
        key=node_key(record.node),
        value=codec.encode(record) if value is None else value,
        create_revision=1,
        mod_revision=1,
        version=1,
        lease_id=NO_LEASE,
    )


async def story(known: Sequence[NodeRecord], changes: Sequence[Snapshot | WatchBatch]) -> list[str]:
    heard: list[str] = []
    leases = NodeLeases(
        known,
        on_seen=lambda r: heard.append(f"+{r.node}.{r.incarnation}"),
        on_gone=lambda r: heard.append(f"-{r.node}.{r.incarnation}"),
    )

    async def feed() -> AsyncIterator[Snapshot | WatchBatch]:
        for change in changes:
            yield change

    await leases.follow(feed())
    return heard


def batch(kind: EventKind, kv: KeyValue) -> WatchBatch:
    return WatchBatch(revision=2, events=(WatchEvent(kind=kind, kv=kv),))


async def test_a_lease_known_at_the_start_that_went_in_a_gap_is_reported_gone() -> None:
    relisted = Snapshot(revision=9, items=(entry(record_of("b")),), relisted=True)
    assert await story([record_of("a"), record_of("b")], [relisted]) == ["-a.1", "+b.1"]


async def test_leases_are_reported_as_they_come_and_go() -> None:
    a, again = record_of("a"), record_of("a", "2")
    changes = [
        batch(EventKind.PUT, entry(a)),
        batch(EventKind.PUT, entry(again)),
        batch(EventKind.DELETE, entry(again, b"")),
        batch(EventKind.DELETE, entry(again, b"")),
    ]
    assert await story([], changes) == ["+a.1", "+a.2", "-a.2"]


async def test_what_is_no_node_record_is_left_alone() -> None:
    foreign = entry(record_of("a"), b"not json")
    other = KeyValue(key="spec", value=b"", create_revision=1, mod_revision=1, version=1, lease_id=NO_LEASE)
    assert await story([], [batch(EventKind.PUT, foreign), batch(EventKind.PUT, other)]) == []
