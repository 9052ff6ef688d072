"""The rules of watching, against a server that plays exactly the answers that lead a careless client astray."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from enum import Enum
from typing import Any

import grpc
import grpc.aio
import pytest

from elastic_run.runtime.edge.etcd import EtcdStore
from elastic_run.runtime.edge.etcd_config import EtcdConfig
from elastic_run.runtime.edge.etcd_proto import rpc_pb2 as rpc
from elastic_run.runtime.edge.store import WatchBatch
from elastic_run.runtime.protocol.errors import StoreCompacted

WAIT_S = 20.0


class Pause(Enum):
    """What the server does instead of answering; progress requests get no answer in either case."""

    STOPPED = "says nothing more, and answers no read"
    QUIET = "says nothing until a read was asked for, and answers that"


Answer = rpc.WatchResponse | Pause
STOPPED, QUIET = Pause.STOPPED, Pause.QUIET


class ScriptedEtcd:
    """Plays one script per watch stream, then ends that stream; `starts` are the revisions asked for."""

    def __init__(self, scripts: Sequence[Sequence[Answer]]) -> None:
        self.scripts = list(scripts)
        self.starts: list[int] = []
        self.progress_requests = 0
        self.probed = asyncio.Event()
        self.answering = asyncio.Event()

    async def range(self, _request: rpc.RangeRequest, _context: object) -> rpc.RangeResponse:
        self.probed.set()
        await self.answering.wait()
        return rpc.RangeResponse()

    async def watch(
        self, requests: AsyncIterator[rpc.WatchRequest], context: "grpc.aio.ServicerContext[object, object]"
    ) -> AsyncGenerator[rpc.WatchResponse, None]:
        self.starts.append((await anext(requests)).create_request.start_revision)
        for answer in self.scripts.pop(0):
            match answer:
                case Pause.STOPPED:
                    async for _ in requests:
                        self.progress_requests += 1
                case Pause.QUIET:
                    self.answering.set()
                    await self.probed.wait()
                case response:
                    yield response


class _Handler(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in the stubs only
    def __init__(self, etcd: ScriptedEtcd) -> None:
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "/etcdserverpb.Watch/Watch": grpc.stream_stream_rpc_method_handler(
                etcd.watch,
                request_deserializer=rpc.WatchRequest.FromString,
                response_serializer=rpc.WatchResponse.SerializeToString,
            ),
            "/etcdserverpb.KV/Range": grpc.unary_unary_rpc_method_handler(
                etcd.range,
                request_deserializer=rpc.RangeRequest.FromString,
                response_serializer=rpc.RangeResponse.SerializeToString,
            ),
        }

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        return self._handlers.get(details.method)


@asynccontextmanager
async def watching(
    scripts: Sequence[Sequence[Answer]], from_revision: int
) -> AsyncGenerator[tuple[ScriptedEtcd, AsyncGenerator[WatchBatch, None]], None]:
    etcd = ScriptedEtcd(scripts)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((_Handler(etcd),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    store = EtcdStore(EtcdConfig(endpoints=(f"127.0.0.1:{port}",), namespace="/j"))
    try:
        async with asyncio.timeout(WAIT_S), aclosing(store.watch("", from_revision)) as batches:
            yield etcd, batches
    finally:
        await store.close()
        await server.stop(None)


def answer(header: int, *revisions: int, fragment: bool = False, created: bool = False) -> rpc.WatchResponse:
    events = [
        rpc.Event(kv=rpc.KeyValue(key=b"/j/k%d" % number, mod_revision=revision, version=1, create_revision=revision))
        for number, revision in enumerate(revisions)
    ]
    return rpc.WatchResponse(
        header=rpc.ResponseHeader(revision=header), events=events, fragment=fragment, created=created
    )


def revisions_of(batch: WatchBatch) -> list[int]:
    return [event.kv.mod_revision for event in batch.events]


async def test_resumes_after_the_last_delivered_event_not_after_the_header() -> None:
    catching_up = [answer(3000, created=True), answer(3000, 7, 8)]  # the header is ahead of what was sent
    async with watching([catching_up, [answer(3000, 9)], [STOPPED]], 5) as (etcd, batches):
        assert revisions_of(await anext(batches)) == [7, 8]
        assert revisions_of(await anext(batches)) == [9]
    assert etcd.starts[:2] == [5, 9]


async def test_a_progress_answer_does_not_move_the_point_of_resumption() -> None:
    async with watching([[answer(90, created=True), answer(90)], [answer(91, 6)], [STOPPED]], 5) as (etcd, batches):
        assert revisions_of(await anext(batches)) == [6]
    assert etcd.starts[:2] == [5, 5]


async def test_from_now_on_is_fixed_by_the_created_answer() -> None:
    async with watching([[answer(41, created=True)], [answer(50, 42)], [STOPPED]], 0) as (etcd, batches):
        assert revisions_of(await anext(batches)) == [42]
    assert etcd.starts[:2] == [0, 42]


async def test_half_a_transaction_is_not_delivered_and_asked_for_again() -> None:
    cut_short = [answer(9, 6, 7, fragment=True)]  # more of revision 7 would follow
    whole = [answer(9, 7, 7, fragment=True), answer(9, 7, 8)]
    async with watching([cut_short, whole, [STOPPED]], 6) as (etcd, batches):
        assert revisions_of(await anext(batches)) == [6]
        assert revisions_of(await anext(batches)) == [7, 7, 7, 8]
    assert etcd.starts[:2] == [6, 7]


async def test_events_from_before_the_point_of_resumption_are_dropped() -> None:
    async with watching([[answer(9, 6, 7)], [answer(9, 7, 8)], [STOPPED]], 6) as (_, batches):
        assert revisions_of(await anext(batches)) == [6, 7]
        assert revisions_of(await anext(batches)) == [8]


async def test_a_stream_of_a_member_that_answers_nothing_is_left() -> None:
    async with watching([[answer(5, created=True), STOPPED], [answer(9, 6)], [STOPPED]], 6) as (etcd, batches):
        assert revisions_of(await anext(batches)) == [6]
        assert etcd.progress_requests == 1
    assert etcd.starts == [6, 6]


async def test_a_quiet_stream_of_a_member_that_answers_reads_is_kept() -> None:
    async with watching([[answer(5, created=True), QUIET, answer(9, 6)], [STOPPED]], 6) as (etcd, batches):
        assert revisions_of(await anext(batches)) == [6]
        assert etcd.starts == [6]


async def test_a_compaction_is_told_with_the_oldest_revision_left() -> None:
    compacted = rpc.WatchResponse(canceled=True, compact_revision=70)
    async with watching([[answer(90, created=True), compacted]], 6) as (_, batches):
        with pytest.raises(StoreCompacted) as told:
            await anext(batches)
        assert told.value.revision == 70


async def test_a_watch_canceled_for_another_reason_is_begun_again() -> None:
    canceled = rpc.WatchResponse(canceled=True, cancel_reason="the member is going away")
    async with watching([[canceled], [answer(9, 6)], [STOPPED]], 6) as (etcd, batches):
        assert revisions_of(await anext(batches)) == [6]
    assert etcd.starts[:2] == [6, 6]
