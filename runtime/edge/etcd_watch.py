"""Follows a range of etcd keys across broken, silent and stopped endpoints, losing and doubling nothing.

Invariants (tests/integration/test_etcd_watch.py, test_etcd_faults.py):
1. After a break the watch resumes at the last *delivered* event's mod_revision + 1. Header revisions are never used for
   that, except of a created response when the caller asked for "from now": while a watcher catches up, etcd sends
   batches whose header is already the newest revision, and progress answers of many releases run ahead, too (etcd
   issue 15220).
2. Events of one transaction are delivered together, though etcd may send them in fragments.
3. A stream that says nothing is asked for progress. Some releases do not answer for a watcher that has had no event, so
   a silent stream is left only when its member does not answer a read either.

Not here: decoding of events (`etcd.py`), snapshots after a compaction (`store.follow`).
"""

from collections.abc import AsyncGenerator

from elastic_run.runtime.edge.etcd_proto import rpc_pb2 as rpc
from elastic_run.runtime.edge.etcd_rpc import RANGE, WATCH, EtcdRpc, EtcdStream
from elastic_run.runtime.edge.etcd_writer import AttemptFailed
from elastic_run.runtime.protocol.errors import StoreCompacted, StoreDenied

SILENCE_S = 1.5  # then the stream is asked for progress
ANSWER_S = 1.0  # then its member is asked for a read
PROBE_S = 0.7  # then it is given up: a stopped member is left after the sum of the three
_DENIALS = ("permission denied", "PermissionDenied", "auth token", "auth store is old", "user name is empty")
DENIALS_MAX = 2  # the first may be an expired token, which etcd does not tell from a missing permission here


async def watch_events(
    client: EtcdRpc, key: bytes, range_end: bytes, from_revision: int, patience_s: float
) -> AsyncGenerator[tuple[rpc.Event, ...], None]:
    """Batches of events, never empty. Raises StoreCompacted, StoreDenied, or StoreUnavailable after `patience_s`."""
    next_revision = from_revision
    tries = client.tries(patience_s)
    denials = 0
    while True:
        answered = False
        held: list[rpc.Event] = []
        try:
            async with await client.open_stream(WATCH, tries.try_s) as stream:
                create = rpc.WatchCreateRequest(
                    key=key, range_end=range_end, start_revision=next_revision, prev_kv=True, fragment=True
                )
                await stream.send(rpc.WatchRequest(create_request=create), tries.try_s)
                while True:
                    response = await _next_response(client, stream, key)
                    if response.canceled:
                        _raise_canceled(client, response, stream.endpoint, last_denial=denials + 1 >= DENIALS_MAX)
                    answered = True
                    denials = 0
                    if response.created and next_revision == 0:
                        next_revision = response.header.revision + 1
                    events, held = _whole_transactions(held, response, next_revision)
                    if events:
                        next_revision = events[-1].kv.mod_revision + 1
                        yield events
        except AttemptFailed as failed:
            denials += isinstance(failed, _DeniedOnce)
            if answered:
                tries = client.tries(patience_s)  # patience counts from the break, not from the last event
            await tries.pause(failed)


class _DeniedOnce(AttemptFailed):
    """The watch was denied, perhaps only because its token had expired."""


async def _next_response(client: EtcdRpc, stream: EtcdStream[rpc.WatchResponse], key: bytes) -> rpc.WatchResponse:
    """The next response, however long it takes, as long as the member shows signs of life."""
    while True:
        response = await stream.receive(SILENCE_S)
        if response is None:
            await stream.send(rpc.WatchRequest(progress_request=rpc.WatchProgressRequest()), ANSWER_S)
            response = await stream.receive(ANSWER_S)
        if response is not None:
            return response
        await client.attempt(RANGE, rpc.RangeRequest(key=key, limit=1), PROBE_S, stream.endpoint)


def _raise_canceled(client: EtcdRpc, response: rpc.WatchResponse, endpoint: str, *, last_denial: bool) -> None:
    if response.compact_revision:
        raise StoreCompacted(response.compact_revision)
    reason = response.cancel_reason
    if any(denial in reason for denial in _DENIALS):
        if last_denial or not client.has_user:
            raise StoreDenied(f"watch: {reason}")
        client.drop_token()
        raise _DeniedOnce(reason, endpoint=endpoint, maybe_applied=False)
    raise AttemptFailed(f"watch canceled: {reason}", endpoint=endpoint, maybe_applied=False)


def _whole_transactions(
    held: list[rpc.Event], response: rpc.WatchResponse, next_revision: int
) -> tuple[tuple[rpc.Event, ...], list[rpc.Event]]:
    """What can be delivered now, and what must wait for the rest of its transaction."""
    events = [*held, *(event for event in response.events if event.kv.mod_revision >= next_revision)]
    if not response.fragment or not events:
        return tuple(events), []
    newest = events[-1].kv.mod_revision
    return (
        tuple(event for event in events if event.kv.mod_revision < newest),
        [event for event in events if event.kv.mod_revision == newest],
    )
